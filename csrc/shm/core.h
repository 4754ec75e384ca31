/* What the files of shardproof._shm share: the layout of the mapped area, one rank's end of it,
 * and what each file offers to the others.
 *
 * Ranks count chunks. A chunk is what one rank announces at a time: a piece of a message in one
 * of its slots, or, in one address space, a loan of its tensors. Chunk k of every rank belongs to
 * the same piece of the same call, so four counters per rank say all: how many chunks it has
 * FILLED, of how many it has SUMMED its slice, with how many it is DONE reading. Slot k % DEPTH
 * may be filled again when everybody is done with chunk k - DEPTH. Counters wrap around, which does
 * no harm to comparisons as long as ranks are close together: every count is waited for by all. */
#ifndef SHARDPROOF_SHM_CORE_H
#define SHARDPROOF_SHM_CORE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum {
    DEPTH = 4,       /* chunks that a rank may announce before the others have read the first */
    TEXT = 2032,     /* bytes of a text that ranks exchange when something is wrong */
    MAX_RANKS = 256, /* on one machine */
    MAX_OWN = 64,    /* parts of one rank in one sum */
    MAX_STARTED = 2, /* sums that are started and not finished */
};

/* `c_modules.py` expects this number, so that an old build beside new sources is not used. It is raised
 * with what Python asks of this module, what ranks write into the area, and what bits sums have. */
enum { PROTOCOL = 3 };

enum word { FILLED, SUMMED, DONE, CONFERRED, WORDS };

/* What a rank lends to others in its address space, until all are done. */
typedef struct {
    const char *const *parts;
    char *out;
} Loan;

/* Written by its rank alone, but for the sleepers. All that a small exchange needs of a peer, its
 * data apart, is in the first 64 bytes. */
typedef struct {
    _Alignas(256) _Atomic uint32_t words[WORDS];
    uint64_t digests[DEPTH]; /* which call a chunk belongs to */
    _Atomic uint32_t sleepers; /* ranks that sleep until one of the words changes */
    _Atomic uint32_t is_reading; /* what others lend */
    Loan loans[DEPTH];
} Line;

typedef struct {
    uint32_t length;
    uint32_t count; /* chunks that the rank has reserved, for a common start after a quarrel */
    uint64_t calls; /* that it has begun, for the same */
    char text[TEXT];
} Note;

typedef struct {
    _Alignas(256) _Atomic uint32_t bell; /* changes when all who wait should look up */
    _Atomic uint32_t claimed;            /* a rank is writing why nobody must go on */
    _Atomic uint32_t is_broken;          /* it has done so */
    _Atomic uint32_t is_withdrawn;       /* a rank takes back what it has lent */
    Note reason;
} Header;

/* Arithmetic of one dtype; `widen` where it is added in float. */
typedef void AddFn(void *out, const void *left, const void *right, size_t count);
typedef void ConvertFn(void *out, const void *in, size_t count);

typedef struct {
    size_t width;
    AddFn *add;
    ConvertFn *widen;
    ConvertFn *narrow; /* back, or from float */
} Kind;

enum { KINDS = 8, FLOAT32 = 0, BFLOAT16 = 2, FLOAT16 = 3 };

typedef struct {
    size_t outer, size, inner, start, stop;
} Window;

/* A sum as one rank sees it, all that is known before the addresses are. */
typedef struct {
    PyObject_HEAD
    uint64_t digest;
    size_t numel;  /* of one part */
    size_t chunk;  /* elements of a part per chunk */
    size_t chunks;
    size_t stride; /* bytes between two parts in a slot */
    const Kind *kind;
    const Kind *out_kind;
    ConvertFn *narrow;  /* after the last addition, or NULL */
    int first, own;     /* this rank's parts are first .. first + own - 1 */
    int parts, steps, deepest; /* deepest: the most places on the stack that are in use */
    int is_sliced;  /* every rank sums its slice, then the slices are gathered */
    int is_windowed;
    Window window;
    int *program;
    int *owners;          /* of each part */
    int *places;          /* of each part, among its owner's */
    const char **sources; /* of each part, in the chunk at hand */
    char *temps;          /* the core's, when this is at work */
} Plan;

typedef struct {
    Plan *plan;
    const char *parts[MAX_OWN];
    char *out;
    uint32_t base;     /* its chunk 0 is chunk `base` of the rank */
    uint32_t sum_base; /* the same for SUMMED, which counts chunks that are summed in slices */
    size_t filled;     /* chunks announced */
    uint64_t noted;    /* of the inputs that its rank has seen since its last call */
} Sum;

/* One rank's end of an area. */
typedef struct {
    PyObject_HEAD
    Py_buffer area;
    Header *header;
    Line *lines;
    Note *notes;
    char *slots;
    size_t slot_bytes; /* 0: tensors are lent, not copied */
    int rank, size;
    uint32_t reserved; /* chunks given to calls so far */
    uint32_t sum_reserved;
    uint32_t known_done; /* all others are known to be done with so many */
    uint64_t calls;
    uint64_t noted; /* goes into the digest of the next call, and is 0 again */
    char *temps; /* one block per place on the stack, for the deepest of the plans in use */
    int deepest;
    Sum started[MAX_STARTED]; /* in turn: others read what is in it, so that it stays in place */
    int first_started, num_started;
    int is_busy;
    int is_lost; /* a wait was given up: the counters are worth nothing any more */
    PyObject *tick;
    PyThreadState *released; /* not NULL while the interpreter lock is not held */
    enum word waiting_word;  /* what the slow wait at hand is for */
    uint32_t waiting_count;
} Core;

/* Results of everything that waits. */
enum { OK = 0, FAILED = -1, DISAGREE = 1 };

/* segment.c */
size_t area_bytes(int size, size_t slot_bytes);
int open_area(Core *core, PyObject *buffer);
char *slot_of(const Core *core, int rank, uint32_t chunk);

/* wait.c */
void announce(Core *core, enum word word, uint32_t count);
int wait_for(Core *core, enum word word, uint32_t count);
int has_come(const Core *core, int rank, enum word word, uint32_t count);
int wait_until_free(Core *core, uint32_t chunk);
int is_free(Core *core, uint32_t chunk);
int check_digests(Core *core, uint32_t chunk);
int begin_reading(Core *core);
void end_reading(Core *core);
void withdraw(Core *core);
void ring(Core *core);
void release_lock(Core *core);
void take_lock(Core *core);

/* add.c */
extern Kind kinds[KINDS];
void choose_kernels(int is_portable);
void evaluate(const Plan *plan, size_t offset, size_t count, char *out);

/* plan.c */
extern PyType_Spec plan_spec;
PyObject *make_plan(Core *core, PyTypeObject *type, PyObject *args);
enum { BLOCK = 1024 }; /* elements that are added at a time, in the first-level cache */

/* sum.c */
int start_sum(Core *core, Sum *sum, size_t most, const Sum *before);
int finish_sum(Core *core, Sum *sum);

/* gather.c */
typedef struct {
    const char *x;
    char *out;
    size_t outer;
    size_t widths[MAX_RANKS]; /* bytes of each rank in one row */
    uint64_t digest;
} Gather;

typedef struct {
    const char *send[MAX_RANKS];
    char *receive[MAX_RANKS];
    size_t send_bytes[MAX_RANKS], receive_bytes[MAX_RANKS];
    size_t longest; /* of any pair of ranks */
    uint64_t digest;
} Exchange;

int gather(Core *core, const Gather *gather);
int exchange(Core *core, const Exchange *exchange);
int meet(Core *core, uint64_t digest);

/* sample.c */
PyObject *sample(PyObject *module, PyObject *const *args, Py_ssize_t count);

/* confer.c */
void write_note(Note *note, const char *text, size_t length);
PyObject *read_notes(const Core *core);
PyObject *confer(Core *core, const char *text, size_t length);
int break_off(Core *core, const char *text, size_t length);
PyObject *broken_because(const Core *core);

#endif
