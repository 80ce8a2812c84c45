/* The native core, as C sees it and as cffi reads it: declarations only, so
 * that the two cannot drift apart.
 *
 * Conventions. The object comes first. A call returns >= 0 or -errno. Nothing
 * here prints, aborts or keeps state outside the object it was given. Lengths
 * are bytes, nr_* are counts of 4096-byte pages, ranges are half open. */

#define CRIUPY_PAGE_SIZE 4096

/* ---- userfaultfd ioctls (uffd.c) ---------------------------------------- */

/* userfaultfd(2); flags are O_CLOEXEC, O_NONBLOCK and UFFD_USER_MODE_ONLY. */
int criupy_uffd_open(int flags);
/* UFFDIO_API, once per descriptor; offered receives the kernel's features. */
int criupy_uffd_api(int uffd, uint64_t features, uint64_t *offered);
/* UFFDIO_REGISTER for missing faults; ioctls receives the range's ioctls. */
int criupy_uffd_register(int uffd, uint64_t start, uint64_t length, uint64_t *ioctls);
int criupy_uffd_unregister(int uffd, uint64_t start, uint64_t length);
/* Each returns 0 or -errno, and in *progress the bytes that were done. Both
 * matter: -EAGAIN after some progress means "that prefix is in, go on". */
int criupy_uffd_copy(int uffd, uint64_t dst, const void *src, uint64_t length, uint64_t *progress);
int criupy_uffd_zeropage(int uffd, uint64_t start, uint64_t length, uint64_t *progress);
int criupy_uffd_poison(int uffd, uint64_t start, uint64_t length, uint64_t *progress);
int criupy_uffd_wake(int uffd, uint64_t start, uint64_t length);
/* 1 when the address space behind the descriptor is alive, 0 when it is gone. */
int criupy_uffd_alive(int uffd);

/* ---- what the images say of one dumped task (image.c) -------------------- */

struct criupy_image;

/* The child of a fork sees zeros here (MADV_WIPEONFORK). */
#define CRIUPY_EXTENT_NOT_INHERITED 1
#define CRIUPY_FILE_SHIFT 48
#define CRIUPY_REMOTE 0xffffffffffffffffu

/* Copy nr_extents lazy extents, in address order and disjoint. id is what the
 * source calls the task (its dump-time pid). data_pages gives each extent's
 * first page in a pages file, and from CRIUPY_FILE_SHIFT on in which; CRIUPY_REMOTE
 * where the source has it, and NULL where that has all. flags may
 * be NULL. -EINVAL for anything unsorted, overlapping, empty or unaligned. */
int criupy_image_create(struct criupy_image **image, uint64_t id, const uint64_t *starts,
			const uint64_t *nr_pages, const uint64_t *data_pages,
			const uint8_t *flags, size_t nr_extents);
/* Serve from this pages file, of which a duplicate is kept: each call brings the next.
 * -EINVAL for one that no extent is in, -ENODATA for one that is too short. */
int criupy_image_attach(struct criupy_image *image, int fd);
void criupy_image_destroy(struct criupy_image *image);
uint64_t criupy_image_nr_pages(const struct criupy_image *image);
/* Record that [page, page + nr) was asked for, or no longer is. */
void criupy_image_set_requested(struct criupy_image *image, uint64_t page, uint64_t nr, int requested);

/* ---- the lazy space of one address space (space.c) ------------------------ */

struct criupy_space;

#define CRIUPY_PAGE_MISSING 0
#define CRIUPY_PAGE_PRESENT 1
#define CRIUPY_PAGE_REMOVED 2
#define CRIUPY_PAGE_POISONED 3
/* These two are answers of criupy_space_lookup only. */
#define CRIUPY_PAGE_IN_FLIGHT 4
#define CRIUPY_PAGE_NONE 5

/* Every page of the image missing, at its dump-time address. The image must
 * outlive the space. */
int criupy_space_create(struct criupy_space **space, struct criupy_image *image);
/* What a forked child has: the parent's states and mappings as of now. */
int criupy_space_fork(const struct criupy_space *parent, struct criupy_space **child);
void criupy_space_destroy(struct criupy_space *space);
/* The state of the page at a run-time address; page receives its number in
 * the image unless the answer is CRIUPY_PAGE_NONE. */
int criupy_space_lookup(const struct criupy_space *space, uint64_t addr, uint64_t *page);
/* Where a page of the image is now, and in nr (in: at most, out: at least 1)
 * how many pages from it on are contiguous there and in the image. -ENOENT
 * when it is mapped nowhere. */
int criupy_space_locate(const struct criupy_space *space, uint64_t page, uint64_t *addr, uint64_t *nr);
/* UFFD_EVENT_REMOVE and UFFD_EVENT_UNMAP: returns how many missing pages are
 * no longer wanted. */
int64_t criupy_space_remove(struct criupy_space *space, uint64_t start, uint64_t length);
/* UFFD_EVENT_REMAP: what was at [from, from + length) is now at to. */
int criupy_space_remap(struct criupy_space *space, uint64_t from, uint64_t to, uint64_t length);
/* Give [page, page + nr) a state. */
void criupy_space_set(struct criupy_space *space, uint64_t page, uint64_t nr, int state);
uint64_t criupy_space_nr_missing(const struct criupy_space *space);
/* The first run at or after *page, inside one extent and at most max long, of
 * pages that are missing (and, unless any is set, not asked for). Returns its
 * length, 0 when there is none. */
uint64_t criupy_space_next_missing(const struct criupy_space *space, uint64_t *page, uint64_t max, int any);

/* ---- page-server frames (codec.c) ----------------------------------------- */

#define CRIUPY_FRAME_24 24
#define CRIUPY_FRAME_32 32
#define CRIUPY_CMD_ADD 1
#define CRIUPY_CMD_HOLE 2
#define CRIUPY_CMD_OPEN 3
#define CRIUPY_CMD_OPEN2 4
#define CRIUPY_CMD_PARENT 5
#define CRIUPY_CMD_ADD_F 6
#define CRIUPY_CMD_GET 7
#define CRIUPY_CMD_CLOSE 0x1023
#define CRIUPY_CMD_FORCE_CLOSE 0x1024
/* Between our own ends only; criupy/wire/extension.py says what they mean. */
#define CRIUPY_CMD_HELLO 0x6301
#define CRIUPY_CMD_GETV 0x6302
#define CRIUPY_CMD_FINISHED 0x6303
#define CRIUPY_CMD_ABORT 0x6304
#define CRIUPY_CMD_REFUSED 0x6305
#define CRIUPY_CMD_MASK 0xffff		/* the page flags are above */
#define CRIUPY_REFUSED_GONE 4		/* reasons of REFUSED: the source is lost */
#define CRIUPY_REFUSED_ENDED 6		/* it goes on, by somebody's decision */
#define CRIUPY_HELLO_LENGTH 64		/* what follows the frame of a HELLO */
#define CRIUPY_MAX_RUNS 256		/* of a GETV, and pages of all of them: */
#define CRIUPY_MAX_RUN_PAGES 1024
#define CRIUPY_RUN_LENGTH 16		/* u64 address, u64 nr_pages */
#define CRIUPY_PE_PARENT 1
#define CRIUPY_PE_LAZY 2
#define CRIUPY_PE_PRESENT 4

struct criupy_frame {
	uint32_t cmd;
	uint64_t nr_pages;
	uint64_t vaddr;
	uint64_t dst_id;
};

/* Encode into size bytes; -EINVAL for another size than 24 or 32, -EOVERFLOW
 * for a count that 24 bytes cannot carry. */
int criupy_frame_encode(const struct criupy_frame *frame, uint8_t *out, size_t size);
int criupy_frame_decode(struct criupy_frame *frame, const uint8_t *in, size_t size);
/* The frame size of a client by the first 24 bytes that it sent: 24 or 32, 0
 * for a leading CLOSE, whose first 24 bytes are the same in both (up to 8 more
 * may follow), or -EPROTO for what no client starts with. */
int criupy_frame_detect(const uint8_t *head);

/* What is wrong with a reply to a GET, or to a GETV, whose address is the number
 * of its runs; 0 is nothing. */
#define CRIUPY_REPLY_COMMAND 1
#define CRIUPY_REPLY_ADDRESS 2
#define CRIUPY_REPLY_ID 3
#define CRIUPY_REPLY_COUNT 4
#define CRIUPY_REPLY_UNASKED 5
#define CRIUPY_REPLY_TLS 6		/* it is TLS, on a link without */
int criupy_reply_check(const struct criupy_frame *reply, const struct criupy_frame *request);

/* ---- what lies between a connection and its socket -------------------------- */

/* The most that one call of send takes, and what a record of TLS holds. */
#define CRIUPY_TRANSPORT_RECORD 16384
/* Room for a sentence about a transport that failed. */
#define CRIUPY_FAULT_LENGTH 512

/* A byte stream that is not the socket's own: TLS, from another extension. The
 * socket is non-blocking and belongs to the connection, which owns the
 * transport, too. -EAGAIN means "not now": events says what to poll(2) for.
 * Failures are for good; -EBADMSG is one that describe has words for, -EPIPE an
 * end of the socket that the peer did not announce. */
struct criupy_transport {
	/* Bytes, 0 at the end that the peer announced, or -errno. */
	int64_t (*receive)(struct criupy_transport *transport, void *into, size_t room);
	/* Take what fits into one record, and nothing else into that record. It may
	 * wait for a flush. */
	int64_t (*send)(struct criupy_transport *transport, const void *data, size_t length);
	/* 0 when everything has gone to the socket. */
	int (*flush)(struct criupy_transport *transport);
	/* Whether a receive may yield something though nothing is in the socket. */
	int (*pending)(struct criupy_transport *transport);
	/* Announce our end, and flush; the peer's is received as before. */
	int (*close_notify)(struct criupy_transport *transport);
	/* What went wrong, as the rest of a sentence about the peer; or nothing. */
	void (*describe)(struct criupy_transport *transport, char *text, size_t room);
	/* Without a word to the peer. */
	void (*destroy)(struct criupy_transport *transport);
	int events;
};

/* ---- latency histogram (histogram.c) --------------------------------------- */

/* 16 linear buckets to each power of two of nanoseconds, 40 powers. */
#define CRIUPY_NR_BUCKETS 640
int criupy_histogram_bucket(uint64_t ns);

/* ---- the pager (pager.c) ---------------------------------------------------- */

struct criupy_pager;

struct criupy_pager_config {
	uint64_t link_timeout_ns;	/* silence with something outstanding: lost */
	uint32_t nr_buffers;		/* staging buffers of 256 KiB each, 3 or more */
	uint32_t request_pages;		/* the longest request */
	uint32_t fault_around_pages;	/* what a fault asks for at most once the tasks run, from its page on */
	uint32_t window_pages;		/* background pages outstanding at most, 0: by measurement */
	uint32_t nr_copiers;		/* threads that copy beside the pager's, at most 16 */
	uint64_t busy_poll_ns;		/* so long it looks for more before it sleeps, while a thread waits for
					 * a page or has just got one; not where a round trip takes longer */
};

/* The life of a pager. It only moves down this list. */
#define CRIUPY_PHASE_RESTORING 0	/* restore-finished has not been read */
#define CRIUPY_PHASE_RUNNING 1		/* it has: the tasks may run */
#define CRIUPY_PHASE_CLOSING 2		/* nothing more is wanted from the source */
#define CRIUPY_PHASE_ENDED 3		/* no task and no link is left */

/* How it ended. */
#define CRIUPY_OUTCOME_NONE 0
#define CRIUPY_OUTCOME_COMPLETE 1	/* every wanted page arrived */
#define CRIUPY_OUTCOME_VETOED 2		/* aborted before restore-finished */
#define CRIUPY_OUTCOME_RESTORE_FAILED 3	/* criu closed without restore-finished */
#define CRIUPY_OUTCOME_GIVEN_UP 4	/* ended by criupy_pager_end */

#define CRIUPY_LINK_NONE 0
#define CRIUPY_LINK_OPEN 1
#define CRIUPY_LINK_CLOSED 2		/* CLOSE was answered */
#define CRIUPY_LINK_RESET 3		/* by us, on purpose */
#define CRIUPY_LINK_LOST 4		/* link_error says why */

/* The connections to the source. A stock one has the first. */
#define CRIUPY_LANE_BULK 0
#define CRIUPY_LANE_URGENT 1

struct criupy_stats {
	uint32_t phase;
	uint32_t outcome;
	uint32_t link;			/* the lane for bulk */
	int32_t link_error;		/* errno; EPROTO: see reply_fault, EPIPE: the peer closed, EBADMSG: link_fault,
					 * EACCES: refused */
	uint32_t urgent_link;		/* the other lane */
	int32_t urgent_error;
	uint32_t refused;		/* the reason in a REFUSED on either, 0: none */
	int32_t error;			/* errno of the pager's own failure, 0 while well */
	int32_t close_status;		/* what the source answered to CLOSE, -1 before */
	int32_t poison_error;		/* errno of UFFDIO_POISON, 0 if it was not refused */
	uint32_t reply_fault;		/* CRIUPY_REPLY_*: what the bad reply violated, on whichever lane */
	struct criupy_frame bad_reply;
	uint64_t bad_reply_offset;	/* bytes received before it there */
	uint64_t nr_obeyed;		/* commands carried out */
	uint64_t created_ns;		/* CLOCK_MONOTONIC, like all times here */
	uint64_t finished_ns;		/* restore-finished was read */
	uint64_t drained_ns;		/* the last wanted page was in */
	uint64_t ended_ns;
	uint64_t nr_tasks;		/* handed over */
	uint64_t nr_forks;		/* children found by UFFD_EVENT_FORK */
	uint64_t nr_gone;		/* address spaces that vanished while pages were missing */
	uint64_t nr_live;		/* address spaces still served */
	uint64_t pages_total;		/* lazy pages of all tasks handed over */
	uint64_t pages_missing;		/* over all live address spaces */
	uint64_t pages_received;	/* from the link, or copied out of local images */
	uint64_t local_total;		/* of these, what is in local images */
	uint64_t local_missing;
	uint64_t local_received;
	uint64_t pages_demand;		/* installed because a fault asked */
	uint64_t pages_background;	/* installed before anything asked */
	uint64_t pages_existing;	/* were there already (EEXIST) */
	uint64_t pages_dropped;		/* no longer wanted: removed, unmapped, or gone */
	uint64_t pages_zero;		/* faults answered with a zero page */
	uint64_t pages_poisoned;
	uint64_t bytes_received;
	uint64_t nr_requests;
	uint64_t nr_demand_requests;
	uint64_t nr_outstanding;	/* pages asked for and not here yet */
	uint64_t window_pages;
	uint64_t rtt_ns;
	uint64_t nr_faults;
	uint64_t nr_events_fork;
	uint64_t nr_events_remap;
	uint64_t nr_events_remove;
	uint64_t nr_events_unmap;
	uint64_t nr_again;		/* copies answered EAGAIN without progress */
	uint64_t nr_notices_lost;
	uint64_t latency_sum_ns;	/* fault read to page installed */
	uint64_t latency_max_ns;
	uint64_t latency[CRIUPY_NR_BUCKETS];
	char link_fault[CRIUPY_FAULT_LENGTH];	/* what the transport says of the link's loss */
	char urgent_fault[CRIUPY_FAULT_LENGTH];
};

#define CRIUPY_NOTICE_TASK_DONE 1	/* a: pid */
#define CRIUPY_NOTICE_TASK_GONE 2	/* a: pid, b: pages it still missed */
#define CRIUPY_NOTICE_NO_MEMORY 3	/* a: pid, b: address */
#define CRIUPY_NOTICE_NO_DESCRIPTOR 4	/* a: pid */
#define CRIUPY_NOTICE_NOT_LOCKED 5	/* the staging buffers could not be locked; error */
#define CRIUPY_NOTICE_FEW_COPIERS 6	/* a: copiers that could be started; error */

struct criupy_notice {
	uint32_t kind;
	int32_t error;
	uint64_t a;
	uint64_t b;
};

/* Start the thread. */
int criupy_pager_create(struct criupy_pager **pager, const struct criupy_pager_config *config);
/* Stop the thread and release everything. If restore-finished was read and
 * pages are missing they are poisoned first: closing would make them zeros. */
void criupy_pager_destroy(struct criupy_pager *pager);
/* An eventfd that becomes readable when a notice or a change of phase or link
 * is there to read. */
int criupy_pager_event_fd(const struct criupy_pager *pager);
void criupy_pager_snapshot(struct criupy_pager *pager, struct criupy_stats *stats);
/* 1 and a notice, or 0. One reader. */
int criupy_pager_next_notice(struct criupy_pager *pager, struct criupy_notice *notice);

/* The calls below hand a command to the thread, which obeys them in order and
 * counts them in nr_obeyed. Descriptors and images pass
 * to the pager when 0 is returned, and stay the caller's otherwise. */

#define CRIUPY_LINK_SHARED 1	/* other holders of the socket exist, so it must end with FORCE_CLOSE */
#define CRIUPY_LINK_EXTENDED 2	/* to a page server of ours, which knows GETV and FINISHED */
#define CRIUPY_MAX_PREAMBLE 128

/* A connection to the source, with frames of frame_size bytes; flags are of the
 * kind above, and only an extended one can be the lane for what is urgent.
 * transport is what carries its bytes and passes like the descriptor; NULL: the
 * socket. preamble is sent first. */
int criupy_pager_set_link(struct criupy_pager *pager, int fd, int frame_size, int flags, int lane,
			  struct criupy_transport *transport, const uint8_t *preamble,
			  size_t preamble_length);
/* Let go of a lane that is lost, by a reset, so that another can be set: only
 * where that is no verdict on a process, and before the end has begun. */
int criupy_pager_drop_link(struct criupy_pager *pager, int lane);
/* A task of the restore. The image is new for each pid; -EINVAL if it lacks a pages file. */
int criupy_pager_add_task(struct criupy_pager *pager, int32_t pid, int uffd, struct criupy_image *image);
/* All tasks are announced: read restore-finished from here. */
int criupy_pager_watch_restore(struct criupy_pager *pager, int fd);
/* Veto the restore and reset the source, unless restore-finished is there. */
int criupy_pager_abort(struct criupy_pager *pager);
/* After restore-finished: fetch nothing more and end only by criupy_pager_end.
 * Threads that touch a missing page wait. */
int criupy_pager_give_up(struct criupy_pager *pager);
/* Give up, poison what is missing, then let go of the tasks. Where the kernel
 * refuses, stats.poison_error says so and the tasks are kept. */
int criupy_pager_poison(struct criupy_pager *pager);
/* Look which address spaces still exist and let go of those that do not. */
int criupy_pager_probe(struct criupy_pager *pager);
/* After giving up: end the link, with a reset (the source goes on), or having
 * read what is outstanding with CLOSE. Tasks that are left are poisoned. */
int criupy_pager_end(struct criupy_pager *pager, int reset);

/* ---- the page server (server.c) ------------------------------------------------ */

/* Gives out the lazy pages of dumped tasks from their images, or receives what
 * a dumper uploads, each connection on a thread of its own. */
struct criupy_server;

struct criupy_server_config {
	uint32_t receives;		/* uploads; no image can be added, no page asked for */
	uint32_t asks;			/* whose a connection is, and about the end of its session */
	uint64_t stall_timeout_ns;	/* for the rest of a frame, and a peer that does not read */
	uint64_t first_timeout_ns;	/* before the first frame; 0: for ever */
	uint64_t idle_timeout_ns;	/* between requests; 0: for ever */
};

/* Why a connection ended. From COMMAND on the client broke the protocol. */
#define CRIUPY_SERVED_CLOSED 0		/* CLOSE was answered, and the peer has closed */
#define CRIUPY_SERVED_EOF 1		/* the peer closed without CLOSE */
#define CRIUPY_SERVED_RESET 2
#define CRIUPY_SERVED_CUT 3		/* by us */
#define CRIUPY_SERVED_IDLE 4		/* nothing was asked for too long */
#define CRIUPY_SERVED_STALLED 5		/* the peer took or sent nothing in the middle of something */
#define CRIUPY_SERVED_DATA 6		/* the images cannot be read; error */
#define CRIUPY_SERVED_ERROR 7		/* error */
#define CRIUPY_SERVED_DISK 8		/* what was uploaded, or fetched, cannot be written; error */
#define CRIUPY_SERVED_REFUSED 9		/* an answer said no; error */
#define CRIUPY_SERVED_SPEAKS_TLS 10	/* on a connection without */
#define CRIUPY_SERVED_TRANSPORT 11	/* fault says what */
#define CRIUPY_SERVED_CHANGED 12	/* the pages file was written since the image was added */
#define CRIUPY_SERVED_GONE 13		/* the source behind us has ended, and we do not have the page */
#define CRIUPY_SERVED_COMMAND 14
#define CRIUPY_SERVED_COUNT 15
#define CRIUPY_SERVED_ADDRESS 16
#define CRIUPY_SERVED_ID 17		/* no such task, or of no type that a pagemap has */
#define CRIUPY_SERVED_PAGE 18		/* not a lazy page of it */
#define CRIUPY_SERVED_TRUNCATED 19	/* the peer closed inside a frame, or inside pages */
#define CRIUPY_SERVED_TRAILING 20	/* something came after CLOSE */
#define CRIUPY_SERVED_FLAGS 21		/* an entry with flags that mean nothing */
#define CRIUPY_SERVED_ORDER 22		/* an entry that begins before the end of the last */
#define CRIUPY_SERVED_UNOPENED 23	/* an entry of another image than the one that is open */

struct criupy_served {
	uint64_t serial;
	uint32_t reason;		/* once it has ended */
	int32_t error;			/* errno */
	struct criupy_frame frame;	/* the one that broke the protocol */
	uint64_t offset;		/* bytes received before it */
	uint32_t frame_size;		/* 0: not known yet */
	uint32_t ended;
	uint64_t started_ns;		/* CLOCK_MONOTONIC */
	uint64_t first_ns;		/* when the first page had gone, 0 before */
	uint64_t ended_ns;
	uint64_t nr_requests;
	uint64_t nr_pages;		/* given out or received */
	uint64_t bytes_received;
	char fault[CRIUPY_FAULT_LENGTH];	/* what the transport says of the end, if anything */
};

int criupy_server_create(struct criupy_server **server, const struct criupy_server_config *config);
/* Cut what is connected, and release everything. */
void criupy_server_destroy(struct criupy_server *server);
/* Give out this image's extents, whose data_pages are in the pages file fd. Both
 * pass to the server when 0 is returned. -EEXIST for an id that is there, -EBUSY
 * once a connection was. */
int criupy_server_add_image(struct criupy_server *server, struct criupy_image *image, int fd);
/* Serve a connected stream socket, which passes to the server when 0 is
 * returned; serial receives its number. transport is what carries its bytes and
 * passes like the descriptor; NULL: the socket. */
int criupy_server_serve(struct criupy_server *server, int fd, struct criupy_transport *transport,
			uint64_t *serial);
/* End a connection; 0 also when it has ended meanwhile. */
int criupy_server_cut(struct criupy_server *server, uint64_t serial);
/* An eventfd that becomes readable when a connection has ended or asks something,
 * and when its first page has gone. */
int criupy_server_event_fd(const struct criupy_server *server);
/* 1 and the account of a connection that has ended, each once, or 0. */
int criupy_server_next_ended(struct criupy_server *server, struct criupy_served *served);
/* Copy the accounts of at most room connections that go on; returns their number. */
int criupy_server_connections(struct criupy_server *server, struct criupy_served *served, int room);

/* What the thread of a connection cannot decide: it waits for the answer. */
struct criupy_question {
	uint64_t serial;		/* of the connection */
	/* Of an upload OPEN, OPEN2, PARENT, CLOSE or FORCE_CLOSE; of a server that asks
	 * HELLO and the first GET or GETV, or whatever comes first from a stock client,
	 * FINISHED, ABORT, CLOSE and FORCE_CLOSE. */
	struct criupy_frame frame;
	uint32_t frame_size;		/* 0: a CLOSE and nothing else */
	uint8_t hello[CRIUPY_HELLO_LENGTH];	/* what follows a HELLO */
	/* The image that an OPEN or CLOSE ends: its entries, in address order. They
	 * stay until the answer, or until the connection's account is taken. */
	uint64_t nr_entries;
	const uint64_t *starts;
	const uint64_t *nr_pages;
	const uint8_t *flags;
};

/* 1 and a question, each once, or 0. */
int criupy_server_next_question(struct criupy_server *server, struct criupy_question *question);
/* Answer it: an OPEN or PARENT with 0 or 1 (there is a parent) or with -errno,
 * which ends the connection; a CLOSE or ABORT with its status, 0 or -errno; HELLO
 * and a first frame with 0, or with the negative reason why not, which ends the
 * connection; FINISHED with 0. fd is where
 * to write the pages of what was opened, -1 otherwise; it passes to the server
 * when 0 is returned. -ESRCH when the connection waits no more. */
int criupy_server_answer(struct criupy_server *server, uint64_t serial, int answer, int fd);

/* Give the blocks of this range of a file back; it reads as zeros afterwards. */
int criupy_punch_hole(int fd, uint64_t offset, uint64_t length);

/* ---- the source of a relay (upstream.c) ------------------------------------------ */

/* Fetches all pages of a stock source over the one connection that it accepts, what
 * somebody waits for first, and keeps them in files for a page server. */
struct criupy_upstream;

struct criupy_upstream_config {
	uint64_t link_timeout_ns;	/* silence with something outstanding: lost */
	uint64_t cache_pages;		/* keep at most so many; 0: all */
};

struct criupy_upstream_stats {
	uint32_t state;			/* CRIUPY_LINK_* */
	int32_t error;			/* of one that is lost, as criupy_stats.link_error */
	int32_t close_status;		/* what the source answered to CLOSE, -1 before */
	int32_t disk_error;		/* errno: nothing more can be kept, nor is it fetched */
	uint32_t complete;		/* every page is kept */
	uint32_t reply_fault;		/* CRIUPY_REPLY_*: what the bad reply violated */
	struct criupy_frame bad_reply;
	uint64_t bad_reply_offset;	/* bytes received before it */
	uint64_t bytes_received;
	uint64_t nr_requests;
	uint64_t nr_urgent;		/* of them, for what a connection waited for */
	uint64_t nr_outstanding;	/* pages asked for and not here yet */
	uint64_t pages_total;
	uint64_t pages_fetched;		/* each time that they were */
	uint64_t pages_kept;
	uint64_t pages_evicted;
	uint64_t pages_given;		/* to the server's connections, again after an eviction */
};

int criupy_upstream_create(struct criupy_upstream **upstream, const struct criupy_upstream_config *config);
/* Stop the thread; a connection that is still open is reset: the source goes on. A
 * server that it was added to keeps what was fetched until it is destroyed itself. */
void criupy_upstream_destroy(struct criupy_upstream *upstream);
/* The lazy extents of a task, whose data_pages say where in fd each page goes. Both
 * pass when 0 is returned. -EEXIST for an id that is there, -EBUSY once started. */
int criupy_upstream_add_image(struct criupy_upstream *upstream, struct criupy_image *image, int fd);
/* Fetch over this connection to the source, which passes when 0 is returned. Once. */
int criupy_upstream_start(struct criupy_upstream *upstream, int fd, int frame_size);
/* An eventfd that becomes readable when the state, an error or completeness changed. */
int criupy_upstream_event_fd(const struct criupy_upstream *upstream);
void criupy_upstream_snapshot(struct criupy_upstream *upstream, struct criupy_upstream_stats *stats);
/* Ask for nothing more, read what is outstanding, say CLOSE and read its answer. */
int criupy_upstream_close(struct criupy_upstream *upstream);
/* The source goes on, whoever else holds the socket. */
int criupy_upstream_reset(struct criupy_upstream *upstream);

/* Let go of the connection, which somebody else holds; it is LOST with ECANCELED then. */
int criupy_upstream_leave(struct criupy_upstream *upstream);

/* Give out what an upstream has and fetches, as with criupy_server_add_image. One for
 * a server. */
int criupy_server_add_upstream(struct criupy_server *server, struct criupy_upstream *upstream);
