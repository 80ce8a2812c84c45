/* Page-server frames, as criu/page-xfer.c writes them: struct page_server_iov
 * in the byte order of the machine, little-endian on all that CRIU lazily
 * migrates between.
 *
 *   3.17 to 4.1.1   u32 cmd, u32 nr_pages, u64 vaddr, u64 dst_id           24 bytes
 *   4.2 on          u32 cmd, padding, u64 nr_pages, u64 vaddr, u64 dst_id  32 bytes
 *
 * The padding is whatever was on the peer's stack: never look at it. */

#include "internal.h"

static void put32(uint8_t *out, uint32_t value)
{
	for (int i = 0; i < 4; i++)
		out[i] = (uint8_t)(value >> 8 * i);
}

static void put64(uint8_t *out, uint64_t value)
{
	for (int i = 0; i < 8; i++)
		out[i] = (uint8_t)(value >> 8 * i);
}

static uint64_t get(const uint8_t *in, int bytes)
{
	uint64_t value = 0;

	for (int i = 0; i < bytes; i++)
		value |= (uint64_t)in[i] << 8 * i;
	return value;
}

int criupy_frame_encode(const struct criupy_frame *frame, uint8_t *out, size_t size)
{
	if (size != CRIUPY_FRAME_24 && size != CRIUPY_FRAME_32)
		return -EINVAL;
	if (size == CRIUPY_FRAME_24 && frame->nr_pages > UINT32_MAX)
		return -EOVERFLOW;
	put32(out, frame->cmd);
	if (size == CRIUPY_FRAME_24) {
		put32(out + 4, (uint32_t)frame->nr_pages);
	} else {
		put32(out + 4, 0);
		put64(out + 8, frame->nr_pages);
	}
	put64(out + size - 16, frame->vaddr);
	put64(out + size - 8, frame->dst_id);
	return 0;
}

int criupy_frame_decode(struct criupy_frame *frame, const uint8_t *in, size_t size)
{
	if (size != CRIUPY_FRAME_24 && size != CRIUPY_FRAME_32)
		return -EINVAL;
	frame->cmd = (uint32_t)get(in, 4);
	frame->nr_pages = size == CRIUPY_FRAME_24 ? get(in + 4, 4) : get(in + 8, 8);
	frame->vaddr = get(in + size - 16, 8);
	frame->dst_id = get(in + size - 8, 8);
	return 0;
}

void run_encode(uint8_t *out, uint64_t address, uint64_t nr_pages)
{
	put64(out, address);
	put64(out + 8, nr_pages);
}

void run_decode(const uint8_t *in, uint64_t *address, uint64_t *nr_pages)
{
	*address = get(in, 8);
	*nr_pages = get(in + 8, 8);
}

/* What the dst_id of everything but a GET numbers: 1 is a task, 2 is shared
 * memory; the rest was sent by CRIU before 3.3. */
bool frame_names_image(uint64_t dst_id)
{
	switch (dst_id & 0xff) {
	case 1: case 10: case 11: case 16: case 17:
	case 2: case 27: case 28: case 29: case 32: case 33: case 34:
		return true;
	default:
		return false;
	}
}

int criupy_frame_detect(const uint8_t *head)
{
	uint64_t second = get(head + 8, 8), third = get(head + 16, 8);

	switch (get(head, 2)) {
	case CRIUPY_CMD_CLOSE:
	case CRIUPY_CMD_FORCE_CLOSE:
		return 0;
	case CRIUPY_CMD_HELLO:
		return CRIUPY_FRAME_32;
	case CRIUPY_CMD_GET:
		/* Short: the address, and no mapping starts below 64 KiB. Long:
		 * a count, and no client asks for 256 MiB at once. */
		return second > 0xffff ? CRIUPY_FRAME_24 : CRIUPY_FRAME_32;
	case CRIUPY_CMD_ADD:
	case CRIUPY_CMD_HOLE:
	case CRIUPY_CMD_OPEN:
	case CRIUPY_CMD_OPEN2:
	case CRIUPY_CMD_PARENT:
	case CRIUPY_CMD_ADD_F:
		/* Short: dst_id with a type in its low byte. Long: the address,
		 * which is aligned (0 in OPEN), and no type is zero. */
		if (frame_names_image(third))
			return CRIUPY_FRAME_24;
		if (third % CRIUPY_PAGE_SIZE == 0)
			return CRIUPY_FRAME_32;
	}
	return -EPROTO;
}

int criupy_reply_check(const struct criupy_frame *reply, const struct criupy_frame *request)
{
	bool all = request->cmd == CRIUPY_CMD_GETV;
	uint32_t cmd = all ? CRIUPY_CMD_GETV : CRIUPY_CMD_ADD_F;

	if (reply->cmd != (cmd | CRIUPY_PE_PRESENT << 16))
		return CRIUPY_REPLY_COMMAND;
	if (reply->vaddr != request->vaddr)
		return CRIUPY_REPLY_ADDRESS;
	if (reply->dst_id != request->dst_id)
		return CRIUPY_REPLY_ID;
	if (!reply->nr_pages || reply->nr_pages > request->nr_pages || (all && reply->nr_pages < request->nr_pages))
		return CRIUPY_REPLY_COUNT;
	return 0;
}
