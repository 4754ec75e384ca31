/* Waiting for the other ranks: a short spin, then the processor is given away, then sleep.
 *
 * Ranks may outnumber cores, so the spin is short: a rank that spins keeps the one it waits for
 * from running. Every 20 ms of sleep Python is asked whether it makes sense to wait on. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <time.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { SPINS = 50, LOOKS = 16 };
static const int64_t YIELDING = 1000 * 1000, SLICE = 20 * 1000 * 1000; /* ns */

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_on(_Atomic uint32_t *word, uint32_t value)
{
    struct timespec slice = {0, SLICE};
#ifdef __linux__
    syscall(SYS_futex, word, FUTEX_WAIT, value, &slice, NULL, 0);
#else
    (void)word, (void)value;
    slice.tv_nsec = 100 * 1000;
    nanosleep(&slice, NULL);
#endif
}

static void wake(_Atomic uint32_t *word)
{
#ifdef __linux__
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
#else
    (void)word;
#endif
}

void release_lock(Core *core)
{
    if (core->released == NULL)
        core->released = PyEval_SaveThread();
}

void take_lock(Core *core)
{
    if (core->released != NULL) {
        PyEval_RestoreThread(core->released);
        core->released = NULL;
    }
}

/* Say that this rank has come so far. */
void announce(Core *core, enum word word, uint32_t count)
{
    Line *line = &core->lines[core->rank];
    atomic_store_explicit(&line->words[word], count, memory_order_release);
    /* Either the sleeper sees the new count before it sleeps, or it is seen here. */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&line->sleepers, memory_order_relaxed))
        wake(&line->words[word]);
}

int has_come(const Core *core, int rank, enum word word, uint32_t count)
{
    uint32_t found = atomic_load_explicit(&core->lines[rank].words[word], memory_order_acquire);
    return (int32_t)(found - count) >= 0;
}

/* Make every sleeper look up. One that is just falling asleep does so after a slice. */
void ring(Core *core)
{
    atomic_fetch_add(&core->header->bell, 1);
    for (int rank = 0; rank < core->size; rank++)
        for (int word = 0; word < WORDS; word++)
            wake(&core->lines[rank].words[word]);
}

/* Ask Python whether to wait on, with the ranks that are missing. */
static int ask(Core *core, int64_t waited)
{
    take_lock(core);
    core->is_lost = 1;
    if (PyErr_CheckSignals() < 0)
        return FAILED;
    PyObject *missing = PyList_New(0);
    for (int rank = 0; missing != NULL && rank < core->size; rank++) {
        if (rank == core->rank || has_come(core, rank, core->waiting_word, core->waiting_count))
            continue;
        PyObject *number = PyLong_FromLong(rank);
        if (number == NULL || PyList_Append(missing, number) < 0)
            Py_CLEAR(missing);
        Py_XDECREF(number);
    }
    if (missing == NULL)
        return FAILED;
    PyObject *answer =
        PyObject_CallFunction(core->tick, "dO", (double)waited * 1e-9, missing);
    Py_DECREF(missing);
    if (answer == NULL)
        return FAILED;
    Py_DECREF(answer);
    core->is_lost = 0;
    release_lock(core);
    return OK;
}

static int sleep_until(Core *core, int rank, int64_t begun, uint32_t bell)
{
    Line *line = &core->lines[rank];
    enum word word = core->waiting_word;
    uint32_t count = core->waiting_count;
    int64_t asked = begun;
    while (!has_come(core, rank, word, count)) {
        atomic_fetch_add(&line->sleepers, 1);
        atomic_thread_fence(memory_order_seq_cst);
        uint32_t found = atomic_load_explicit(&line->words[word], memory_order_acquire);
        if ((int32_t)(found - count) < 0 && atomic_load(&core->header->bell) == bell)
            sleep_on(&line->words[word], found);
        atomic_fetch_sub(&line->sleepers, 1);
        int64_t time = now();
        uint32_t rung = atomic_load(&core->header->bell);
        if (time - asked < SLICE && rung == bell)
            continue;
        if (ask(core, time - begun) < 0)
            return FAILED;
        asked = time;
        bell = rung;
    }
    return OK;
}

static int wait_slowly(Core *core, int rank, enum word word, uint32_t count)
{
    /* A thread that waits for a thread to come must not keep the interpreter from it. One that
     * has come needs it no more until all are done. */
    if (core->slot_bytes == 0 && word == FILLED)
        release_lock(core);
    for (int spin = 0; spin < SPINS; spin++) {
        pause_briefly();
        if (has_come(core, rank, word, count))
            return OK;
    }
    release_lock(core);
    uint32_t bell = atomic_load(&core->header->bell);
    int64_t begun = now();
    do {
        for (int look = 0; look < LOOKS; look++) {
            sched_yield();
            if (has_come(core, rank, word, count))
                return OK;
        }
    } while (now() - begun < YIELDING);
    core->waiting_word = word;
    core->waiting_count = count;
    return sleep_until(core, rank, begun, bell);
}

/* Wait until all others have come so far. */
int wait_for(Core *core, enum word word, uint32_t count)
{
    for (int rank = 0; rank < core->size; rank++) {
        if (rank == core->rank || has_come(core, rank, word, count))
            continue;
        if (wait_slowly(core, rank, word, count) < 0)
            return FAILED;
    }
    return OK;
}

/* Wait for what nobody does any more, until the tick says why. */
static int wait_for_reason(Core *core)
{
    uint32_t count =
        atomic_load_explicit(&core->lines[core->rank].words[CONFERRED], memory_order_relaxed);
    if (wait_for(core, CONFERRED, count + 1) == OK) {
        take_lock(core);
        core->is_lost = 1;
        PyErr_SetString(PyExc_RuntimeError, "a rank has withdrawn what it lent");
    }
    return FAILED;
}

/* Before this rank reads what others lend, never for longer than it takes: no waits in between.
 * Either it sees here that a rank has withdrawn, or that rank sees that this one reads. */
int begin_reading(Core *core)
{
    atomic_store(&core->lines[core->rank].is_reading, 1);
    if (!atomic_load(&core->header->is_withdrawn))
        return OK;
    end_reading(core);
    return wait_for_reason(core);
}

void end_reading(Core *core)
{
    atomic_store_explicit(&core->lines[core->rank].is_reading, 0, memory_order_release);
}

/* This rank has given up a wait, and what it has lent may be gone when it returns: nobody reads it
 * from now on, and who does so already comes to an end, which is a matter of C alone. */
void withdraw(Core *core)
{
    atomic_store(&core->header->is_withdrawn, 1);
    for (int rank = 0; rank < core->size; rank++)
        while (rank != core->rank && atomic_load(&core->lines[rank].is_reading)) {
            release_lock(core);
            sched_yield();
        }
}

/* The own line counts too: what is announced ahead must not overtake what is still to be done. */
static void look_who_is_done(Core *core)
{
    uint32_t least = core->reserved;
    for (int rank = 0; rank < core->size; rank++) {
        uint32_t done =
            atomic_load_explicit(&core->lines[rank].words[DONE], memory_order_acquire);
        if ((int32_t)(done - least) < 0)
            least = done;
    }
    core->known_done = least;
}

/* Whether this rank's slot of `chunk` may be filled. */
int is_free(Core *core, uint32_t chunk)
{
    uint32_t needed = chunk + 1 - DEPTH;
    if ((int32_t)(core->known_done - needed) < 0)
        look_who_is_done(core);
    return (int32_t)(core->known_done - needed) >= 0;
}

int wait_until_free(Core *core, uint32_t chunk)
{
    return is_free(core, chunk) ? OK : wait_for(core, DONE, chunk + 1 - DEPTH);
}

/* Whether all ranks, which have filled `chunk`, mean the same by it. */
int check_digests(Core *core, uint32_t chunk)
{
    uint64_t mine = core->lines[core->rank].digests[chunk % DEPTH];
    uint64_t difference = 0;
    for (int rank = 0; rank < core->size; rank++)
        difference |= core->lines[rank].digests[chunk % DEPTH] ^ mine;
    look_who_is_done(core); /* their lines are at hand now, which saves a look before a fill */
    return difference ? DISAGREE : OK;
}
