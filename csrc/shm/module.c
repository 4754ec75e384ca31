/* shardproof._shm: ranks that share memory, processes or threads. The Python face; no torch. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyMethodDef methods[] = {
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shardproof._shm",
    .m_doc = "Exchanges between ranks that share memory.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__shm(void) { return PyModule_Create(&definition); }
