/* Moving bytes: every rank's to all, and from each to each. */
#include "core.h"

#include <string.h>

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Put bytes from .. from + count - 1 of a rank's `widths[rank] * outer` in their place. */
static void place(const Gather *gather, int rank, size_t total, const char *source, size_t from,
                  size_t count)
{
    size_t width = gather->widths[rank], column = 0;
    for (int before = 0; before < rank; before++)
        column += gather->widths[before];
    while (count) {
        size_t row = from / width, skipped = from % width;
        size_t length = smaller(width - skipped, count);
        memcpy(gather->out + row * total + column + skipped, source, length);
        source += length, from += length, count -= length;
    }
}

/* Reserve a chunk of its own for a call that lends. */
static int announce_loan(Core *core, Loan loan, uint64_t digest, uint32_t *number)
{
    *number = core->reserved++;
    core->calls++;
    if (wait_until_free(core, *number) < 0)
        return FAILED;
    core->lines[core->rank].loans[*number % DEPTH] = loan;
    core->lines[core->rank].digests[*number % DEPTH] = digest;
    announce(core, FILLED, *number + 1);
    int result = wait_for(core, FILLED, *number + 1);
    return result == OK ? check_digests(core, *number) : result;
}

static int gather_lent(Core *core, const Gather *gather, size_t total)
{
    uint32_t number;
    Loan loan = {&gather->x, NULL}; /* in the caller's frame, which stays until all have read */
    int result = announce_loan(core, loan, gather->digest, &number);
    if (result != OK)
        return result;
    if (total * gather->outer > 16 * 1024)
        release_lock(core);
    if (begin_reading(core) < 0)
        return FAILED;
    for (int rank = 0; rank < core->size; rank++) {
        const char *source = core->lines[rank].loans[number % DEPTH].parts[0];
        place(gather, rank, total, source, 0, gather->outer * gather->widths[rank]);
    }
    end_reading(core);
    announce(core, DONE, number + 1);
    return wait_for(core, DONE, number + 1);
}

static int fill_slot(Core *core, const Gather *gather, size_t chunk, uint32_t number)
{
    size_t bytes = gather->outer * gather->widths[core->rank], from = chunk * core->slot_bytes;
    if (wait_until_free(core, number) < 0)
        return FAILED;
    if (from < bytes)
        memcpy(slot_of(core, core->rank, number), gather->x + from,
               smaller(core->slot_bytes, bytes - from));
    core->lines[core->rank].digests[number % DEPTH] = gather->digest + chunk;
    announce(core, FILLED, number + 1);
    return OK;
}

static void empty_slots(const Core *core, const Gather *gather, size_t total, size_t chunk,
                        uint32_t number)
{
    size_t from = chunk * core->slot_bytes;
    for (int rank = 0; rank < core->size; rank++) {
        size_t bytes = gather->outer * gather->widths[rank];
        if (from >= bytes)
            continue;
        const char *source =
            rank == core->rank ? gather->x + from : slot_of(core, rank, number);
        place(gather, rank, total, source, from, smaller(core->slot_bytes, bytes - from));
    }
}

int gather(Core *core, const Gather *gather)
{
    size_t total = 0, widest = 0;
    for (int rank = 0; rank < core->size; rank++) {
        total += gather->widths[rank];
        widest = gather->widths[rank] > widest ? gather->widths[rank] : widest;
    }
    if (core->slot_bytes == 0)
        return gather_lent(core, gather, total);
    size_t bytes = widest * gather->outer;
    size_t chunks = bytes ? (bytes + core->slot_bytes - 1) / core->slot_bytes : 1;
    uint32_t base = core->reserved;
    core->reserved += (uint32_t)chunks;
    core->calls++;
    if (bytes > 32 * 1024)
        release_lock(core);
    int result = fill_slot(core, gather, 0, base);
    for (size_t chunk = 0; result == OK && chunk < chunks; chunk++) {
        uint32_t number = base + (uint32_t)chunk;
        if (chunk + 1 < chunks) /* ahead, so that the others need not wait for it */
            result = fill_slot(core, gather, chunk + 1, number + 1);
        if (result == OK)
            result = wait_for(core, FILLED, number + 1);
        if (result == OK)
            result = check_digests(core, number);
        if (result != OK)
            return result;
        empty_slots(core, gather, total, chunk, number);
        announce(core, DONE, number + 1);
    }
    return result;
}

/* From each to each; a slot has one lane for every receiver. */
int exchange(Core *core, const Exchange *exchange)
{
    size_t lane = core->slot_bytes / (size_t)core->size / 64 * 64;
    size_t chunks = exchange->longest ? (exchange->longest + lane - 1) / lane : 1;
    uint32_t base = core->reserved;
    core->reserved += (uint32_t)chunks;
    core->calls++;
    release_lock(core);
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        uint32_t number = base + (uint32_t)chunk;
        size_t from = chunk * lane;
        if (wait_until_free(core, number) < 0)
            return FAILED;
        for (int rank = 0; rank < core->size; rank++)
            if (rank != core->rank && from < exchange->send_bytes[rank])
                memcpy(slot_of(core, core->rank, number) + (size_t)rank * lane,
                       exchange->send[rank] + from,
                       smaller(lane, exchange->send_bytes[rank] - from));
        core->lines[core->rank].digests[number % DEPTH] = exchange->digest + chunk;
        announce(core, FILLED, number + 1);
        int result = wait_for(core, FILLED, number + 1);
        if (result == OK)
            result = check_digests(core, number);
        if (result != OK)
            return result;
        for (int rank = 0; rank < core->size; rank++)
            if (rank != core->rank && from < exchange->receive_bytes[rank])
                memcpy(exchange->receive[rank] + from,
                       slot_of(core, rank, number) + (size_t)core->rank * lane,
                       smaller(lane, exchange->receive_bytes[rank] - from));
        announce(core, DONE, number + 1);
    }
    return OK;
}

/* Only meet: whatever the ranks have for each other, they hand over in Python. */
int meet(Core *core, uint64_t digest)
{
    uint32_t number;
    int result = announce_loan(core, (Loan){NULL, NULL}, digest, &number);
    if (result == OK)
        announce(core, DONE, number + 1);
    return result;
}
