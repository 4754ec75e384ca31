/* Sums straight from the other ranks' memory.
 *
 * Copied: each rank fills its slot with its parts of a chunk; when all have, each rank adds up the
 * whole chunk, or its window, or its slice, which the others then fetch from its slot.
 * Lent (one address space): the parts are read where they lie, and nobody returns before all are
 * done. */
#include "core.h"

#include <stdlib.h>
#include <string.h>

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Where the slice of `rank` begins in a chunk of `length` elements: whole cache lines, mostly. */
static size_t slice_start(const Core *core, size_t length, int rank)
{
    if (rank == core->size)
        return length;
    return length * (size_t)rank / (size_t)core->size / 16 * 16;
}

static size_t length_of(const Plan *plan, size_t chunk)
{
    return smaller(plan->chunk, plan->numel - chunk * plan->chunk);
}

/* Copy this rank's parts of the next chunk into its slot, which is free, and say so. */
static void fill(Core *core, Sum *sum)
{
    const Plan *plan = sum->plan;
    uint32_t number = sum->base + (uint32_t)sum->filled;
    size_t bytes = length_of(plan, sum->filled) * plan->kind->width;
    size_t offset = sum->filled * plan->chunk * plan->kind->width;
    char *slot = slot_of(core, core->rank, number);
    for (int part = 0; bytes && part < plan->own; part++) /* a tensor of nothing has no address */
        memcpy(slot + (size_t)part * plan->stride, sum->parts[part] + offset, bytes);
    core->lines[core->rank].digests[number % DEPTH] = plan->digest + sum->noted + sum->filled;
    sum->filled++;
    announce(core, FILLED, number + 1);
}

static void find_sources(const Core *core, const Sum *sum, size_t chunk)
{
    const Plan *plan = sum->plan;
    uint32_t number = sum->base + (uint32_t)chunk;
    size_t offset = chunk * plan->chunk * plan->kind->width;
    for (int part = 0; part < plan->parts; part++) {
        int owner = plan->owners[part];
        const char *slot = slot_of(core, owner, number);
        plan->sources[part] = owner == core->rank
                                  ? sum->parts[part - plan->first] + offset
                                  : slot + (size_t)plan->places[part] * plan->stride;
    }
}

/* Add up what of elements start .. start + length - 1 lies in this rank's window. */
static void add_window(const Plan *plan, size_t start, size_t length, char *out)
{
    const Window *w = &plan->window;
    size_t row = w->size * w->inner, width = (w->stop - w->start) * w->inner;
    if (width == 0 || length == 0)
        return;
    for (size_t r = start / row; r * row < start + length; r++) {
        size_t first = r * row + w->start * w->inner, last = first + width;
        size_t from = first > start ? first : start, to = smaller(last, start + length);
        if (from < to)
            evaluate(plan, from - start, to - from,
                     out + (r * width + from - first) * plan->out_kind->width);
    }
}

/* Sum this rank's slice of a chunk, and leave it in the slot too, where the others fetch it. Its
 * slice of the slot is its own: nobody else reads that. */
static void add_slice(Core *core, const Sum *sum, size_t chunk)
{
    const Plan *plan = sum->plan;
    size_t length = length_of(plan, chunk), width = plan->out_kind->width;
    size_t from = slice_start(core, length, core->rank);
    size_t count = slice_start(core, length, core->rank + 1) - from;
    char *out = sum->out + (chunk * plan->chunk + from) * width;
    evaluate(plan, from, count, out);
    if (core->slot_bytes)
        memcpy(slot_of(core, core->rank, sum->base + (uint32_t)chunk) + from * plan->kind->width,
               out, count * width);
}

static void fetch_slices(const Core *core, const Sum *sum, size_t chunk)
{
    const Plan *plan = sum->plan;
    size_t length = length_of(plan, chunk), width = plan->out_kind->width;
    for (int rank = 0; rank < core->size; rank++) {
        if (rank == core->rank)
            continue;
        size_t from = slice_start(core, length, rank);
        size_t count = slice_start(core, length, rank + 1) - from;
        size_t place = (chunk * plan->chunk + from) * width;
        const char *source =
            core->slot_bytes
                ? slot_of(core, rank, sum->base + (uint32_t)chunk) + from * plan->kind->width
                : core->lines[rank].loans[sum->base % DEPTH].out + place;
        memcpy(sum->out + place, source, count * width);
    }
}

/* One chunk, of which this rank has filled its slot. */
static int finish_chunk(Core *core, Sum *sum, size_t chunk)
{
    const Plan *plan = sum->plan;
    uint32_t number = sum->base + (uint32_t)chunk;
    int result = wait_for(core, FILLED, number + 1);
    if (result == OK)
        result = check_digests(core, number);
    if (result != OK)
        return result;
    size_t start = chunk * plan->chunk, length = length_of(plan, chunk);
    find_sources(core, sum, chunk);
    if (plan->is_sliced) {
        uint32_t wanted = sum->sum_base + (uint32_t)chunk + 1;
        add_slice(core, sum, chunk);
        announce(core, SUMMED, wanted);
        if (wait_for(core, SUMMED, wanted) < 0)
            return FAILED;
        fetch_slices(core, sum, chunk);
    } else if (plan->is_windowed) {
        add_window(plan, start, length, sum->out);
    } else {
        evaluate(plan, 0, length, sum->out + start * plan->out_kind->width);
    }
    announce(core, DONE, number + 1);
    return OK;
}

static int finish_copied(Core *core, Sum *sum)
{
    for (size_t chunk = 0; chunk < sum->plan->chunks; chunk++) {
        while (sum->filled < sum->plan->chunks && sum->filled < chunk + 2 &&
               is_free(core, sum->base + (uint32_t)sum->filled))
            fill(core, sum);
        if (sum->filled == chunk) {
            if (wait_until_free(core, sum->base + (uint32_t)chunk) < 0)
                return FAILED;
            fill(core, sum);
        }
        int result = finish_chunk(core, sum, chunk);
        if (result != OK)
            return result;
    }
    return OK;
}

/* Whether this rank's result lies where others may still read its parts. */
static int overlaps(const Sum *sum, size_t out_bytes)
{
    size_t bytes = sum->plan->numel * sum->plan->kind->width;
    for (int part = 0; part < sum->plan->own; part++)
        if (sum->parts[part] < sum->out + out_bytes && sum->out < sum->parts[part] + bytes)
            return 1;
    return 0;
}

static void find_lent(const Core *core, const Sum *sum)
{
    const Plan *plan = sum->plan;
    for (int part = 0; part < plan->parts; part++) {
        const Loan *loan = &core->lines[plan->owners[part]].loans[sum->base % DEPTH];
        plan->sources[part] = loan->parts[plan->places[part]];
    }
}

/* Slice by slice: `out` may be this rank's part, for nobody reads what another one has summed. */
static int add_lent_slices(Core *core, Sum *sum)
{
    const Plan *plan = sum->plan;
    size_t step = plan->chunk * plan->kind->width;
    for (size_t chunk = 0; chunk <= plan->chunks; chunk++) {
        if (chunk < plan->chunks) {
            if (begin_reading(core) < 0)
                return FAILED;
            add_slice(core, sum, chunk);
            end_reading(core);
            announce(core, SUMMED, sum->sum_base + (uint32_t)chunk + 1);
            for (int part = 0; part < plan->parts; part++)
                plan->sources[part] += step;
        }
        if (chunk == 0)
            continue;
        if (wait_for(core, SUMMED, sum->sum_base + (uint32_t)chunk) < 0)
            return FAILED;
        if (begin_reading(core) < 0)
            return FAILED;
        fetch_slices(core, sum, chunk - 1);
        end_reading(core);
    }
    return OK;
}

/* All at once, aside if others may still read what lies at `out`. */
static int add_lent_whole(Core *core, Sum *sum)
{
    const Plan *plan = sum->plan;
    const Window *w = &plan->window;
    size_t numel = plan->is_windowed ? w->outer * (w->stop - w->start) * w->inner : plan->numel;
    size_t bytes = numel * plan->out_kind->width;
    char *aside = overlaps(sum, bytes) ? malloc(bytes) : NULL;
    char *out = aside != NULL ? aside : sum->out;
    if (aside == NULL && overlaps(sum, bytes)) {
        take_lock(core);
        PyErr_NoMemory();
        core->is_lost = 1; /* so that the others do not wait for it, and read no more of it */
        return FAILED;
    }
    if (begin_reading(core) < 0) {
        free(aside);
        return FAILED;
    }
    if (plan->is_windowed)
        add_window(plan, 0, plan->numel, out);
    else
        evaluate(plan, 0, numel, out);
    end_reading(core);
    announce(core, DONE, sum->base + 1);
    int result = wait_for(core, DONE, sum->base + 1);
    if (aside != NULL)
        memcpy(sum->out, aside, bytes);
    free(aside);
    return result;
}

static int finish_lent(Core *core, Sum *sum)
{
    int result = wait_for(core, FILLED, sum->base + 1);
    if (result == OK)
        result = check_digests(core, sum->base);
    if (result != OK)
        return result;
    if (sum->plan->numel * sum->plan->kind->width > 16 * 1024)
        release_lock(core);
    if (begin_reading(core) < 0)
        return FAILED;
    find_lent(core, sum);
    end_reading(core);
    if (!sum->plan->is_sliced)
        return add_lent_whole(core, sum);
    if (add_lent_slices(core, sum) < 0)
        return FAILED;
    announce(core, DONE, sum->base + 1);
    return wait_for(core, DONE, sum->base + 1);
}

static int lend(Core *core, Sum *sum)
{
    if (wait_until_free(core, sum->base) < 0)
        return FAILED;
    Line *line = &core->lines[core->rank];
    line->loans[sum->base % DEPTH] = (Loan){sum->parts, sum->out};
    line->digests[sum->base % DEPTH] = sum->plan->digest + sum->noted;
    sum->filled = 1;
    announce(core, FILLED, sum->base + 1);
    return OK;
}

/* Announce as much of it as can be without waiting for anybody, no more than `most` chunks; what was
 * started `before`, and is not finished, goes first. */
int start_sum(Core *core, Sum *sum, size_t most, const Sum *before)
{
    int lends = core->slot_bytes == 0;
    sum->base = core->reserved;
    sum->sum_base = core->sum_reserved;
    sum->filled = 0;
    sum->noted = core->noted;
    core->noted = 0;
    core->reserved += lends ? 1 : (uint32_t)sum->plan->chunks;
    if (sum->plan->is_sliced)
        core->sum_reserved += (uint32_t)sum->plan->chunks;
    core->calls++;
    if (lends)
        return lend(core, sum);
    if (sum->plan->numel * sum->plan->kind->width > 32 * 1024)
        release_lock(core);
    if (before != NULL && before->filled < before->plan->chunks)
        return OK;
    if (sum->plan->chunks < most)
        most = sum->plan->chunks;
    while (sum->filled < most && is_free(core, sum->base + (uint32_t)sum->filled))
        fill(core, sum);
    return OK;
}

/* Finish what was started first. */
int finish_sum(Core *core, Sum *sum)
{
    sum->plan->temps = core->temps;
    return core->slot_bytes ? finish_copied(core, sum) : finish_lent(core, sum);
}
