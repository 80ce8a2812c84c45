/* How a pager ends.
 *
 * The source takes the way its connection ends as a verdict on its process: a
 * FIN or an answered CLOSE means "it runs elsewhere" and kills it, an RST means
 * "it does not" and lets it go on. So the connection must end as what is true:
 *
 *   before restore-finished   no task has run. Closing the restore socket makes
 *                             criu kill them, so an RST is right
 *   after it                  a task may run here. CLOSE, read the status, FIN;
 *                             an RST only once every task is known to be dead
 *
 * "Before" and "after" are decided by the four bytes in the restore socket, and
 * criu may be sending them right now. shutdown(SHUT_RD) settles it: what came
 * before can still be read, what comes later fails at criu's end.
 *
 * Under TLS a FIN says nothing of the kind unless a close_notify came before it,
 * so an RST leaves that out, and what takes the place of a FIN begins with it.
 *
 * A page server of ours does not guess: over the lane for bulk of an extended
 * connection it is told that a task may run (FINISHED), and of the end (CLOSE, or
 * an ABORT that is said over a connection of its own). How such a lane ends is no
 * verdict, so one that is lost is just closed.
 *
 * And a userfaultfd that is closed turns every missing page into zeros, so
 * after restore-finished it is let go only when nothing is missing, when the
 * address space is gone, or when what is missing has been poisoned. */

#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "pager.h"

#define RESTORE_FINISHED 0x52535446u	/* LAZY_PAGES_RESTORE_FINISHED, criu/include/uffd.h */
#define MAX_POISON_PAGES 512
#define POISON_PATIENCE_NS UINT64_C(5000000000)

static void close_restore(struct criupy_pager *p)
{
	if (p->restore >= 0) {
		unwatch(p, p->restore);
		close(p->restore);
	}
	p->restore = -1;
}

static void release_all(struct criupy_pager *p)
{
	for (struct task *t = p->tasks; t; t = t->next)
		task_release(p, t);
}

/* No task has run and none will. */
static void undo(struct criupy_pager *p, uint32_t outcome)
{
	close_restore(p);
	lanes_reset(p);
	release_all(p);
	p->stats.outcome = outcome;
	pager_set_phase(p, CRIUPY_PHASE_ENDED);
}

/* 1 when the word was read, 0 when it is not there yet, -errno when it never
 * will be. */
static int read_word(struct criupy_pager *p)
{
	while (p->restore_have < sizeof(p->restore_word)) {
		ssize_t got = recv(p->restore, p->restore_word + p->restore_have,
				   sizeof(p->restore_word) - p->restore_have, MSG_DONTWAIT);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return errno == EAGAIN ? 0 : -errno;
		if (!got)
			return -EPIPE;
		p->restore_have += (size_t)got;
	}
	return 1;
}

static bool word_is_finished(const struct criupy_pager *p)
{
	uint32_t word;

	memcpy(&word, p->restore_word, sizeof(word));
	return word == RESTORE_FINISHED;
}

static void finished(struct criupy_pager *p)
{
	close_restore(p);
	p->stats.finished_ns = p->now_ns;
	p->some_may_be_done = true;
	pager_set_phase(p, CRIUPY_PHASE_RUNNING);
	lane_send_finished(p, bulk_lane(p));
}

void restore_read(struct criupy_pager *p)
{
	int ret;

	if (p->restore < 0 || p->stats.phase != CRIUPY_PHASE_RESTORING)
		return;
	ret = read_word(p);
	if (!ret)
		return;
	if (ret > 0 && word_is_finished(p)) {
		finished(p);
	} else {
		if (ret > 0)
			p->stats.error = EPROTO;
		undo(p, CRIUPY_OUTCOME_RESTORE_FAILED);
	}
}

void restore_abort(struct criupy_pager *p)
{
	if (p->stats.phase != CRIUPY_PHASE_RESTORING)
		return;
	if (p->restore >= 0) {
		(void)shutdown(p->restore, SHUT_RD);
		if (read_word(p) > 0 && word_is_finished(p)) {
			finished(p);
			return;
		}
	}
	undo(p, CRIUPY_OUTCOME_VETOED);
}

/* ---- after restore-finished ------------------------------------------------------ */

/* True when nothing is left to poison in this space before a page, false when the kernel
 * would not (stats.poison_error). */
static bool poison(struct criupy_pager *p, struct task *t, uint64_t end)
{
	uint64_t page = 0, limit = MAX_POISON_PAGES, since = monotonic_ns();

	task_drain(p, t);
	while (t->uffd >= 0) {
		uint64_t nr = space_next_missing(t->space, &page, end, limit, true), addr, progress;
		int ret;

		if (!nr) {
			/* Events may have moved something behind us. */
			if (!task_drain(p, t))
				return true;
			page = 0;
			continue;
		}
		if (criupy_space_locate(t->space, page, &addr, &nr)) {
			criupy_space_set(t->space, page, 1, CRIUPY_PAGE_REMOVED);
			continue;
		}
		ret = criupy_uffd_poison(t->uffd, addr, nr << PAGE_SHIFT, &progress);
		if (progress) {
			criupy_space_set(t->space, page, progress >> PAGE_SHIFT, CRIUPY_PAGE_POISONED);
			p->stats.pages_poisoned += progress >> PAGE_SHIFT;
			limit = MAX_POISON_PAGES;
			since = monotonic_ns();
			continue;
		}
		switch (ret) {
		case -EAGAIN:
		case -ENOMEM:
			if (monotonic_ns() - since > POISON_PATIENCE_NS) {
				p->stats.poison_error = -ret;
				return false;
			}
			if (!task_drain(p, t))
				nanosleep(&(struct timespec){ .tv_nsec = 50000 }, NULL);
			page = 0;
			break;
		case -EEXIST:
			criupy_space_set(t->space, page, 1, CRIUPY_PAGE_PRESENT);
			(void)criupy_uffd_wake(t->uffd, addr, CRIUPY_PAGE_SIZE);
			break;
		case -ENOENT:
			if (nr > 1) {
				limit = nr / 2;
			} else {
				limit = MAX_POISON_PAGES;
				if (!task_drain(p, t))
					criupy_space_set(t->space, page, 1, CRIUPY_PAGE_REMOVED);
			}
			break;
		case -ESRCH:
		case -ENOSPC:
			task_gone(p, t);
			break;
		default:
			p->stats.poison_error = -ret;
			return false;
		}
	}
	return true;
}

/* A link that is lost takes what the source had, and nothing that is here. */
static bool poison_task(struct criupy_pager *p, struct task *t)
{
	const struct criupy_image *image = t->space->image;

	if (image->first_local && bulk_lane(p)->state == CRIUPY_LINK_LOST) {
		if (!poison(p, t, image->first_local))
			return false;
		fetch_local_rest(p, t);
	}
	return poison(p, t, image->nr_pages);
}

void poison_all(struct criupy_pager *p)
{
	if (p->stats.phase != CRIUPY_PHASE_RUNNING)
		return;
	p->given_up = true;
	p->stats.poison_error = 0;
	install_all_deferred(p);
	for (struct task *t = p->tasks; t; t = t->next) {
		if (t->uffd < 0)
			continue;
		t->poisoned = poison_task(p, t);
		if (t->poisoned)
			task_release(p, t);
	}
	pager_publish(p);
}

void probe_all(struct criupy_pager *p)
{
	for (struct task *t = p->tasks; t; t = t->next)
		if (t->uffd >= 0 && !criupy_uffd_alive(t->uffd))
			task_gone(p, t);
	pager_publish(p);
}

void end_link(struct criupy_pager *p, bool reset)
{
	if (p->stats.phase != CRIUPY_PHASE_RUNNING)
		return;
	if (p->stats.nr_live)
		poison_all(p);
	p->given_up = true;
	p->final_outcome = CRIUPY_OUTCOME_GIVEN_UP;
	/* A poisoned task may run on: two running ones are worse than a source
	 * that ends. */
	if (reset && !p->stats.nr_live && !p->stats.pages_poisoned)
		lanes_reset(p);
	pager_set_phase(p, CRIUPY_PHASE_CLOSING);
}

/* A link that cannot answer a CLOSE any more, while a task may run here: a FIN
 * must reach the source before anything that would reset it. Half a request
 * before the FIN would revive it, and so would a reply that comes when nobody
 * reads any more. True when the link is closed. */
static bool close_lost_lane(struct criupy_pager *p, struct lane *l)
{
	uint8_t waste[4096];
	struct iovec into = { waste, sizeof(waste) };
	size_t rest = l->out_have % l->frame_size;
	ssize_t got = 1;
	int told = 0;

	if (l->link.fd < 0)
		return true;
	if (l->extended) {
		/* Such a source hears of the end over a connection of its own. */
		lane_close(p, l);
		return true;
	}
	if (!l->farewell_ns)
		l->farewell_ns = p->now_ns;
	if (rest) {
		ssize_t sent = l->link.send(&l->link, l->out, rest);

		if (sent > 0) {
			l->out_have -= (size_t)sent;
			memmove(l->out, l->out + sent, l->out_have);
			rest -= (size_t)sent;
		}
	}
	if (l->link.transport) {
		/* Whole frames only are taken; after a failure it has no words left. */
		rest = 0;
		told = l->link.transport->close_notify(l->link.transport);
	}
	if (!rest && told != -EAGAIN)
		(void)shutdown(l->link.fd, SHUT_WR);
	for (int i = 0; i < 16384 && got > 0; i++)
		got = l->link.receive(&l->link, &into, 1);
	/* Who was silent for that long already is not waited for again. */
	if ((got > 0 || got == -EAGAIN || got == -EINTR) && !p->stopping && l->error != ETIMEDOUT &&
	    p->now_ns - l->farewell_ns < p->config.link_timeout_ns)
		return false;
	l->farewell_ns = 0;
	link_close(&l->link);
	return true;
}

static void release_done(struct criupy_pager *p)
{
	for (struct task *t = p->tasks; t; t = t->next) {
		if (t->uffd < 0 || t->space->nr_missing)
			continue;
		if (!t->forked)
			pager_notice(p, CRIUPY_NOTICE_TASK_DONE, 0, (uint64_t)t->pid, 0);
		task_release(p, t);
	}
}

void check_done(struct criupy_pager *p)
{
	struct lane *bulk = bulk_lane(p), *urgent = urgent_lane(p);

	/* After a failure of our own there may be a process that is in no list. */
	if (p->stats.phase == CRIUPY_PHASE_RUNNING && !p->given_up && !p->stats.error) {
		/* To let go of one may take back from a copier what another missed. */
		while (p->some_may_be_done) {
			p->some_may_be_done = false;
			release_done(p);
		}
		if (!p->stats.nr_live) {
			p->stats.drained_ns = monotonic_ns();
			p->final_outcome = CRIUPY_OUTCOME_COMPLETE;
			pager_set_phase(p, CRIUPY_PHASE_CLOSING);
		}
	}
	if (p->stats.phase != CRIUPY_PHASE_CLOSING)
		return;
	if (bulk->state == CRIUPY_LINK_OPEN) {
		if (bulk->close_sent || !lane_is_idle(bulk) ||
		    (urgent->state == CRIUPY_LINK_OPEN && !lane_is_idle(urgent)))
			return;
		lane_close(p, urgent);
		lane_send_close(p, bulk);
		return;
	}
	if (bulk->state == CRIUPY_LINK_LOST && !close_lost_lane(p, bulk))
		return;
	lane_close(p, urgent);
	p->stats.outcome = p->final_outcome;
	pager_set_phase(p, CRIUPY_PHASE_ENDED);
}
