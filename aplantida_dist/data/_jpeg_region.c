/* A rectangle of a baseline JPEG as RGB, by libjpeg-turbo: what lies beside it is entropy-decoded and no more.

   The pixels are those of a whole decode, bit for bit: the same inverse DCT and upsampling (libjpeg-turbo's defaults), and a margin of
   one block column and row around the rectangle, so that the upsampling at its edges sees its neighbours. All entropy-coded data is
   read to the end of the picture, so that every warning of a whole decode comes here too; the first one ends the decoding. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or newer is needed"
#endif

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf stumbled;
    char text[JMSG_LENGTH_MAX];
} Errors;

typedef struct {
    JDIMENSION width, height;            /* of the whole picture */
    JDIMENSION left, upper, right, lower; /* the rectangle in it */
} Box;

static void stumble(j_common_ptr info) {
    Errors *errors = (Errors *)info->err;
    errors->base.format_message(info, errors->text);
    longjmp(errors->stumbled, 1);
}

static void stumble_on_warnings(j_common_ptr info, int level) {
    if (level < 0)
        stumble(info);
}

static int refuse(Errors *errors, const char *text) {
    snprintf(errors->text, sizeof errors->text, "%s", text);
    return 0;
}

/* Whether all of these values are the mid-grey that decoders put in the place of missing rows. */
static int is_grey(const JSAMPLE *values, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (values[i] != 127 && values[i] != 128)
            return 0;
    return 1;
}

/* Skip towards this row, in whole rows of blocks: libjpeg-turbo has returned wrong rows after skips that began or ended within one. */
static void skip_to(struct jpeg_decompress_struct *info, JDIMENSION row, JDIMENSION block_rows) {
    JDIMENSION start = (info->output_scanline + block_rows - 1) / block_rows * block_rows;
    JDIMENSION end = row / block_rows * block_rows;
    if (start == info->output_scanline && start < end)
        jpeg_skip_scanlines(info, end - start);
}

/* Decode into `pixels`, RGB rows without gaps; 0 with a text in errors where that cannot be, or where it takes a whole decode to judge. */
static int decode(const unsigned char *content, size_t length, Box box, JSAMPLE *pixels, Errors *errors) {
    struct jpeg_decompress_struct info;
    JSAMPLE *volatile row = NULL;
    info.err = jpeg_std_error(&errors->base);
    errors->base.error_exit = stumble;
    errors->base.emit_message = stumble_on_warnings;
    if (setjmp(errors->stumbled)) {
        free(row);
        jpeg_destroy_decompress(&info);
        return 0;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, content, (unsigned long)length);
    jpeg_read_header(&info, TRUE);
    int sound = 1;
    if (info.progressive_mode || info.arith_code || jpeg_has_multiple_scans(&info) || info.num_components != 3)
        sound = refuse(errors, "not a baseline JPEG of three colours in one scan");
    info.out_color_space = JCS_RGB;
    if (sound) {
        jpeg_start_decompress(&info);
        if (info.output_width != box.width || info.output_height != box.height)
            sound = refuse(errors, "the picture has another size");
    }
    if (sound) {
        JDIMENSION block_rows = (JDIMENSION)(info.max_v_samp_factor * DCTSIZE);
        JDIMENSION margin = (JDIMENSION)(info.max_h_samp_factor * DCTSIZE);
        JDIMENSION first = box.left > margin ? box.left - margin : 0;
        JDIMENSION width = (box.right + margin < info.output_width ? box.right + margin : info.output_width) - first;
        jpeg_crop_scanline(&info, &first, &width);
        size_t row_size = (size_t)(box.right - box.left) * 3, skipped = (size_t)(box.left - first) * 3;
        row = malloc((size_t)info.output_width * 3);
        if (row == NULL) {
            refuse(errors, "no memory for a row");
            longjmp(errors->stumbled, 1);
        }
        if (box.upper > block_rows)
            skip_to(&info, box.upper - block_rows, block_rows);
        while (info.output_scanline < info.output_height) {
            JDIMENSION y = info.output_scanline;
            JSAMPROW rows[1] = {row};
            jpeg_read_scanlines(&info, rows, 1);
            if (y >= box.upper && y < box.lower)
                memcpy(pixels + (size_t)(y - box.upper) * row_size, row + skipped, row_size);
            if (info.output_scanline >= box.lower && info.output_height > 2 * block_rows)
                skip_to(&info, info.output_height - 1 - block_rows, block_rows);
        }
        if (is_grey(row + skipped, row_size))
            sound = refuse(errors, "ends in grey");
        free(row);
        row = NULL;
        jpeg_finish_decompress(&info);
    }
    jpeg_destroy_decompress(&info);
    return sound;
}

static PyObject *decode_region(PyObject *module, PyObject *arguments) {
    Py_buffer content, pixels;
    int width, height, left, upper, right, lower, sound = 0;
    Errors errors;
    if (!PyArg_ParseTuple(arguments, "y*(ii)(iiii)w*", &content, &width, &height, &left, &upper, &right, &lower, &pixels))
        return NULL;
    errors.text[0] = '\0';
    if (left < 0 || upper < 0 || right <= left || lower <= upper || right > width || lower > height
        || pixels.len != (Py_ssize_t)(right - left) * (lower - upper) * 3) {
        refuse(&errors, "the rectangle and the room for its pixels do not fit");
    } else {
        Box box = {(JDIMENSION)width, (JDIMENSION)height, (JDIMENSION)left, (JDIMENSION)upper, (JDIMENSION)right, (JDIMENSION)lower};
        Py_BEGIN_ALLOW_THREADS
        sound = decode(content.buf, (size_t)content.len, box, pixels.buf, &errors);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&content);
    PyBuffer_Release(&pixels);
    if (!sound) {
        PyErr_SetString(PyExc_ValueError, errors.text);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"decode_region", decode_region, METH_VARARGS,
     "decode_region(content, (width, height), (left, upper, right, lower), pixels): decode this rectangle of a JPEG of this size into a "
     "writable buffer. Raises ValueError where the picture needs another decoder."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_jpeg_region", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg_region(void) {
    return PyModule_Create(&definition);
}
