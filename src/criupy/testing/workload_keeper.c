/* SPDX-License-Identifier: MIT */
/*
 * The keeper: runs a command, adopts and reaps whatever descends from it, tells of
 * every end on a pipe, and ends all of it when its standard input closes, so also
 * when the Python that started it was killed.
 *
 *   --keep [--namespace] [--bind FROM TO]... --report FD -- COMMAND...
 *
 * With --namespace the keeper is process 1 of a new pid namespace with its own
 * mounts, which is where a process can be restored while its source still owns the
 * pid; --bind puts FROM over TO in there first. Without, it is a subreaper: pid 1 of
 * a machine may be slow to reap, and a zombie that leads a session blocks its pid.
 *
 * Report lines, pids as the keeper sees them:
 *   started PID
 *   ended PID exited|killed NUMBER USER_US SYSTEM_US MAX_RSS_KIB
 */
#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_BINDS 8
#define LOWEST_KEPT 3

struct keeper {
	bool namespace;
	int report;
	int nr_binds;
	char *bind_from[MAX_BINDS];
	char *bind_to[MAX_BINDS];
	char **command;
};

static int complain(const char *what, const char *object)
{
	fprintf(stderr, "keeper: %s %s: %s\n", what, object, strerror(errno));
	return 1;
}

static int parse(struct keeper *keeper, int argc, char **argv)
{
	int i = 1;

	for (; i < argc && strcmp(argv[i], "--"); i++) {
		if (!strcmp(argv[i], "--namespace")) {
			keeper->namespace = true;
		} else if (!strcmp(argv[i], "--report") && i + 1 < argc) {
			keeper->report = atoi(argv[++i]);
		} else if (!strcmp(argv[i], "--bind") && i + 2 < argc && keeper->nr_binds < MAX_BINDS) {
			keeper->bind_from[keeper->nr_binds] = argv[++i];
			keeper->bind_to[keeper->nr_binds++] = argv[++i];
		} else {
			return -EINVAL;
		}
	}
	keeper->command = argv + i + 1;
	return i + 1 < argc && keeper->report >= 0 ? 0 : -EINVAL;
}

static void report_end(const struct keeper *keeper, pid_t pid, int status, const struct rusage *used)
{
	bool killed = WIFSIGNALED(status);

	dprintf(keeper->report, "ended %d %s %d %lld %lld %ld\n", pid, killed ? "killed" : "exited",
		killed ? WTERMSIG(status) : WEXITSTATUS(status),
		(long long)used->ru_utime.tv_sec * 1000000 + used->ru_utime.tv_usec,
		(long long)used->ru_stime.tv_sec * 1000000 + used->ru_stime.tv_usec, used->ru_maxrss);
}

/* Reap all that have ended; false when there is no child left. */
static bool reap(const struct keeper *keeper)
{
	struct rusage used;
	int status;
	pid_t pid;

	while ((pid = wait4(-1, &status, WNOHANG, &used)) > 0)
		report_end(keeper, pid, status, &used);
	return !pid;
}

/* Kill the children of now; what they leave behind becomes ours and goes in the next round. */
static void kill_children(pid_t command)
{
	char path[64];
	FILE *children;
	int pid;

	snprintf(path, sizeof(path), "/proc/self/task/%d/children", getpid());
	children = fopen(path, "re");
	if (!children) {
		/* a kernel without the list: the command leads a process group */
		kill(-command, SIGKILL);
		return;
	}
	while (fscanf(children, "%d", &pid) == 1)
		kill(pid, SIGKILL);
	fclose(children);
}

static _Noreturn void become_command(const struct keeper *keeper)
{
	sigset_t none;
	int null;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	null = open("/dev/null", O_RDONLY);
	if (null < 0 || dup2(null, 0) < 0)
		_exit(complain("open", "/dev/null"));
	if (null > 0)
		close(null);
	close(keeper->report);
	execvp(keeper->command[0], keeper->command);
	complain("start", keeper->command[0]);
	_exit(127);
}

static int keep(const struct keeper *keeper)
{
	sigset_t child;
	pid_t command;
	int signals;

	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, NULL);
	signals = signalfd(-1, &child, SFD_NONBLOCK | SFD_CLOEXEC);
	if (signals < 0)
		return complain("make", "a signalfd");
	command = fork();
	if (command < 0)
		return complain("fork for", keeper->command[0]);
	if (!command)
		become_command(keeper);
	/* descriptors meant for the command must not stay open here: their closing is a message */
	for (int fd = LOWEST_KEPT; fd < 1024; fd++)
		if (fd != keeper->report && fd != signals)
			close(fd);
	dprintf(keeper->report, "started %d\n", command);
	for (;;) {
		struct pollfd ready[] = { { .fd = 0, .events = POLLIN }, { .fd = signals, .events = POLLIN } };
		struct signalfd_siginfo info;

		if (poll(ready, 2, -1) < 0 && errno != EINTR)
			return complain("poll", "for events");
		while (read(signals, &info, sizeof(info)) > 0)
			;
		reap(keeper);
		if (ready[0].revents)
			break;
	}
	if (keeper->namespace)
		return 0; /* the kernel ends everything in a pid namespace with its first process */
	while (reap(keeper)) {
		kill_children(command);
		pause_us(1000);
	}
	return 0;
}

/* The first process of the namespace: its own mounts, then keep. */
static int keep_namespace(const struct keeper *keeper)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return complain("make private", "/");
	for (int i = 0; i < keeper->nr_binds; i++)
		if (mount(keeper->bind_from[i], keeper->bind_to[i], NULL, MS_BIND, NULL))
			return complain("bind", keeper->bind_to[i]);
	if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
		return complain("mount", "/proc");
	return keep(keeper);
}

int keeper_main(int argc, char **argv)
{
	struct keeper keeper = { .report = -1 };
	int status;
	pid_t pid;

	if (parse(&keeper, argc, argv)) {
		fprintf(stderr, "keeper: --keep [--namespace] [--bind FROM TO]... --report FD -- COMMAND...\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	if (!keeper.namespace) {
		if (prctl(PR_SET_CHILD_SUBREAPER, 1))
			return complain("become", "a subreaper");
		return keep(&keeper);
	}
	if (unshare(CLONE_NEWPID | CLONE_NEWNS))
		return complain("make", "a pid namespace (it needs root)");
	pid = fork();
	if (pid < 0)
		return complain("fork into", "the namespace");
	if (!pid)
		_exit(keep_namespace(&keeper));
	for (int fd = LOWEST_KEPT; fd < 1024; fd++)
		close(fd);
	close(0);
	if (waitpid(pid, &status, 0) != pid)
		return complain("wait for", "the namespace");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
