/* fst_python.c - batches become torch tensors, memory becomes NumPy arrays, and dicts that hold an
 * object are found. The only file that knows Python.
 *
 * Two ways into torch: torch's C exchange API (torch 2.13 and later: one function call a
 * tensor), else capsules handed to torch's own from_dlpack.
 */
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <stdio.h>

#include "file/fst_header.h"
#include "tensor/fst_batch.h"

static void capsule_destructor(PyObject *capsule) {
    /* Renamed to "used_dltensor" by a consumer that took it; else it is still ours. */
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
    if (managed != NULL) managed->deleter(managed);
}

/* Gives element i to torch. On failure, too, it is torch's or already deleted. */
static PyObject *import_one(fst_batch *batch, uint64_t i, const dl_exchange_api *api,
                            PyObject *from_dlpack) {
    if (api != NULL) {
        void *tensor = NULL;
        dl_managed_versioned *managed = fst_batch_versioned(batch, i);
        if (api->to_object(managed, &tensor) == 0) return tensor;
        /* DLPack calls it stolen, yet torch 2.13 forgets the deleter of a dtype it refuses. */
        if (managed->manager != NULL) fst_batch_drop(batch, 1);
        return NULL;
    }
    PyObject *capsule = PyCapsule_New(fst_batch_plain(batch, i), "dltensor", capsule_destructor);
    if (capsule == NULL) {
        fst_batch_drop(batch, 1);
        return NULL;
    }
    PyObject *tensor = PyObject_CallFunctionObjArgs(from_dlpack, capsule, NULL);
    Py_DECREF(capsule);
    return tensor;
}

static int describe_exception(const char *library, fst_error *err) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *text = value == NULL ? NULL : PyObject_Str(value);
    PyObject *bytes = text == NULL ? NULL : PyUnicode_AsUTF8String(text);
    const char *message = bytes == NULL ? NULL : PyBytes_AsString(bytes);
    int code = fst_fail(err, FST_E_PYTHON, 0, "%s refused a tensor: %s", library,
                        message == NULL ? "no message" : message);
    Py_XDECREF(bytes);
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    PyErr_Clear();
    return code;
}

int fst_tensors_import(fst_arena *arena, const fst_layout_view *view, const uint64_t *which,
                       uint64_t count, const uint64_t *offsets, uint64_t file_base,
                       const fst_dl_dtype *table, uintptr_t exchange_api, uintptr_t from_dlpack,
                       uintptr_t list, fst_error *err) {
    fst_batch *batch;
    if (count == 0) return FST_OK;
    int code = fst_batch_create(arena, view, which, count, offsets, file_base, table, &batch, err);
    if (code != FST_OK) return code;
    PyGILState_STATE gil = PyGILState_Ensure();
    /* A garbage collection during the import walks the whole heap and finds nothing:
     * 60 of 74 ms for 18,867 tensors in a process that has imported torch. */
    int collecting = PyGC_Disable();
    for (uint64_t i = 0; i < count && code == FST_OK; i++) {
        PyObject *tensor =
            import_one(batch, i, (const dl_exchange_api *)exchange_api, (PyObject *)from_dlpack);
        if (tensor == NULL || PyList_Append((PyObject *)list, tensor) != 0) {
            code = describe_exception("torch", err);
            fst_batch_drop(batch, count - i - 1);
        }
        Py_XDECREF(tensor);
    }
    if (collecting) (void)PyGC_Enable();
    PyGILState_Release(gil);
    fst_batch_drop(batch, 1);
    return code;
}

/* A tuple of a tensor's dimensions; NULL with an exception set. */
static PyObject *shape_of(const fst_layout_view *view, const fst_tensor *tensor) {
    PyObject *shape = PyTuple_New((Py_ssize_t)tensor->ndim);
    for (uint32_t d = 0; shape != NULL && d < tensor->ndim; d++) {
        PyObject *length = PyLong_FromLongLong(view->dims[tensor->dims_index + d]);
        if (length == NULL || PyTuple_SetItem(shape, (Py_ssize_t)d, length) != 0) Py_CLEAR(shape);
    }
    return shape;
}

/* frombuffer(memory, dtype, numbers, offset).reshape(shape); NULL with an exception set. */
static PyObject *array_over(PyObject *frombuffer, PyObject *memory, PyObject *dtype,
                            uint64_t numbers, uint64_t offset, PyObject *reshape, PyObject *shape) {
    PyObject *flat = NULL, *array = NULL;
    PyObject *count = PyLong_FromUnsignedLongLong(numbers);
    PyObject *at = PyLong_FromUnsignedLongLong(offset);
    if (count != NULL && at != NULL && shape != NULL)
        flat = PyObject_CallFunctionObjArgs(frombuffer, memory, dtype, count, at, NULL);
    if (flat != NULL) array = PyObject_CallMethodObjArgs(flat, reshape, shape, NULL);
    Py_XDECREF(flat);
    Py_XDECREF(at);
    Py_XDECREF(count);
    return array;
}

int fst_arrays_make(const fst_layout_view *view, const uint64_t *which, uint64_t count,
                    const uint64_t *offsets, uint64_t file_base, const fst_np_dtype *table,
                    uintptr_t frombuffer, uintptr_t memory, uintptr_t list, uint64_t *left,
                    fst_error *err) {
    int code = FST_OK;
    *left = 0;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *reshape = PyUnicode_InternFromString("reshape");
    if (reshape == NULL) code = describe_exception("Python", err);
    for (uint64_t i = 0; i < count && code == FST_OK; i++) {
        uint64_t index = which == NULL ? i : which[i];
        if (index >= view->count) {
            code = fst_fail(err, FST_E_INVALID, 0, "no such tensor in the layout");
            break;
        }
        const fst_tensor *tensor = &view->tensors[index];
        fst_np_dtype as = table[tensor->dtype];
        uint64_t offset = offsets == NULL ? file_base + tensor->begin : offsets[i];
        uint64_t bytes = tensor->end - tensor->begin;
        PyObject *array;
        if (as.dtype == 0) {
            code = fst_fail(err, FST_E_INVALID, 0, "a dtype that was not looked up");
            break;
        }
        if (bytes == 0 || offset % as.alignment != 0) {
            array = Py_None;
            Py_INCREF(array);
            *left += 1;
        } else {
            PyObject *shape = shape_of(view, tensor);
            array = array_over((PyObject *)frombuffer, (PyObject *)memory, (PyObject *)as.dtype,
                               bytes / as.itemsize, offset, reshape, shape);
            Py_XDECREF(shape);
        }
        if (array == NULL || PyList_Append((PyObject *)list, array) != 0)
            code = describe_exception("NumPy", err);
        Py_XDECREF(array);
    }
    Py_XDECREF(reshape);
    PyGILState_Release(gil);
    return code;
}

int fst_arena_adopt_capsule(uintptr_t capsule, fst_arena **out, fst_error *err) {
    PyObject *object = (PyObject *)capsule;
    int code;
    *out = NULL;
    PyGILState_STATE gil = PyGILState_Ensure();
    if (PyCapsule_IsValid(object, "dltensor")) {
        code = fst_arena_adopt((uintptr_t)PyCapsule_GetPointer(object, "dltensor"), out, err);
        /* Else its destructor would give the memory back, too. */
        if (code == FST_OK) (void)PyCapsule_SetName(object, "used_dltensor");
    } else {
        code = fst_fail(err, FST_E_INVALID, 0, "no unused DLPack capsule");
    }
    PyGILState_Release(gil);
    return code;
}

/* A slot of a small table by an object's address, for a quick no: objects are 16 bytes apart. */
static size_t slot_of(uintptr_t object) { return (object >> 4) % 1024; }

void fst_dicts_holding(const uintptr_t *dicts, uint64_t count, const uintptr_t *objects,
                       uint64_t wanted, uint8_t *found) {
    bool likely[1024] = {false};
    for (uint64_t k = 0; k < wanted; k++) likely[slot_of(objects[k])] = true;
    PyGILState_STATE gil = PyGILState_Ensure();
    for (uint64_t i = 0; i < count; i++) {
        PyObject *key, *value;
        Py_ssize_t at = 0;
        found[i] = 0;
        while (!found[i] && PyDict_Next((PyObject *)dicts[i], &at, &key, &value)) {
            if (!likely[slot_of((uintptr_t)value)]) continue;
            for (uint64_t k = 0; k < wanted; k++) {
                if (objects[k] == (uintptr_t)value) found[i] = 1;
            }
        }
    }
    PyGILState_Release(gil);
}
