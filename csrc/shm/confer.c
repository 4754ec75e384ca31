/* When something is wrong: ranks that disagree tell each other what they meant, and a rank that
 * knows of a failure tells all. */
#include "core.h"

#include <string.h>

void write_note(Note *note, const char *text, size_t length)
{
    if (length > TEXT)
        length = TEXT;
    memcpy(note->text, text, length);
    note->length = (uint32_t)length;
}

/* Its rank may write it at the same time: what is decoded is a copy, as long as it was found. */
static PyObject *read_note(const Note *note)
{
    char text[TEXT];
    uint32_t length = *(const volatile uint32_t *)&note->length;
    if (length > TEXT)
        length = TEXT;
    memcpy(text, note->text, length);
    return PyUnicode_DecodeUTF8(text, length, "replace");
}

/* The notes of all ranks, in rank order. */
PyObject *read_notes(const Core *core)
{
    PyObject *texts = PyList_New(0);
    for (int rank = 0; texts != NULL && rank < core->size; rank++) {
        PyObject *each = read_note(&core->notes[rank]);
        if (each == NULL || PyList_Append(texts, each) < 0)
            Py_CLEAR(texts);
        Py_XDECREF(each);
    }
    return texts;
}

static int meet_again(Core *core)
{
    uint32_t count =
        1 + atomic_load_explicit(&core->lines[core->rank].words[CONFERRED], memory_order_relaxed);
    announce(core, CONFERRED, count);
    return wait_for(core, CONFERRED, count);
}

/* Begin anew at the largest numbers of chunks and calls that any rank has come to. */
static void start_anew(Core *core)
{
    uint32_t count = core->notes[0].count;
    for (int rank = 0; rank < core->size; rank++) {
        if ((int32_t)(core->notes[rank].count - count) > 0)
            count = core->notes[rank].count;
        if (core->notes[rank].calls > core->calls)
            core->calls = core->notes[rank].calls;
    }
    core->reserved = core->sum_reserved = core->known_done = count;
    for (int word = FILLED; word <= DONE; word++)
        atomic_store(&core->lines[core->rank].words[word], count);
    for (int i = 0; i < MAX_STARTED; i++)
        Py_CLEAR(core->started[i].plan);
    core->num_started = 0;
}

/* The texts of all ranks, in rank order; all of them must come here. */
PyObject *confer(Core *core, const char *text, size_t length)
{
    Note *note = &core->notes[core->rank];
    write_note(note, text, length);
    note->count = core->reserved;
    note->calls = core->calls;
    if ((int32_t)(core->sum_reserved - note->count) > 0)
        note->count = core->sum_reserved;
    if (meet_again(core) < 0)
        return NULL;
    take_lock(core);
    PyObject *texts = read_notes(core);
    start_anew(core);
    if (texts != NULL && meet_again(core) < 0)
        Py_CLEAR(texts);
    return texts;
}

/* Tell everybody why nobody must go on; the first to say so is heard. */
int break_off(Core *core, const char *text, size_t length)
{
    uint32_t nobody = 0;
    if (!atomic_compare_exchange_strong(&core->header->claimed, &nobody, 1))
        return 0;
    write_note(&core->header->reason, text, length);
    atomic_store(&core->header->is_broken, 1);
    ring(core);
    return 1;
}

PyObject *broken_because(const Core *core)
{
    if (!atomic_load(&core->header->is_broken))
        Py_RETURN_NONE;
    return read_note(&core->header->reason);
}
