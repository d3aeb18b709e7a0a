/* A rectangle of a baseline JPEG as RGB, by libjpeg-turbo: what lies beside it is entropy-decoded and no more.

   The pixels are those of a whole decode, bit for bit: the same inverse DCT and upsampling (libjpeg-turbo's defaults), and a margin of
   one sample of colour around the rectangle, so that the upsampling at its edges sees its neighbours. All entropy-coded data is read to the end
   of the picture, so that every warning of a whole decode comes here too; the first one ends the decoding. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <setjmp.h>
#include <stdio.h>
#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or newer is needed"
#endif

#define ROWS_AT_ONCE 4 /* as many as libjpeg-turbo upsamples together, at most */

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf stumbled;
    char text[JMSG_LENGTH_MAX];
} Errors;

typedef struct {
    JDIMENSION width, height;             /* of the whole picture */
    JDIMENSION left, upper, right, lower; /* the rectangle in it */
} Region;

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

/* Whether all of these values are the mid-grey that decoders put in the place of missing rows: MID_GREY of decode.py. */
static int is_grey(const JSAMPLE *values, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (values[i] != 127 && values[i] != 128)
            return 0;
    return 1;
}

/* At the start of a row of blocks, skip to the start of the one that holds `target`; elsewhere, and backwards, do nothing: skips that
   begin or end within a row of blocks have gone wrong in libjpeg-turbo. */
static void skip_to(struct jpeg_decompress_struct *info, JDIMENSION target, JDIMENSION block_height) {
    JDIMENSION here = info->output_scanline, there = target - target % block_height;
    if (here % block_height == 0 && here < there)
        jpeg_skip_scanlines(info, there - here);
}

/* Decode the rows from `upper` to `lower` into `strip`, whose rows are as wide as the picture, and there from `left` to `right`, and at
   most up to a whole margin beside; the last row of the picture is looked at, too. 0, with a text in errors, where it stands for missing
   ones. */
static int read_rows(struct jpeg_decompress_struct *info, Region region, JSAMPLE *strip, Errors *errors) {
    JDIMENSION block_height = (JDIMENSION)(info->max_v_samp_factor * DCTSIZE);
    JDIMENSION margin_x = (JDIMENSION)info->max_h_samp_factor, margin_y = (JDIMENSION)info->max_v_samp_factor;
    JDIMENSION first = region.left > margin_x ? region.left - margin_x : 0;
    JDIMENSION width = (region.width - region.right > margin_x ? region.right + margin_x : region.width) - first;
    jpeg_crop_scanline(info, &first, &width); /* moves first to the left, to the edge of a block; first + width stays */
    size_t row_size = (size_t)region.width * 3, offset = (size_t)first * 3;
    JSAMPROW beside = (*info->mem->alloc_small)((j_common_ptr)info, JPOOL_IMAGE, row_size); /* for rows that are not asked for */
    JSAMPROW rows[ROWS_AT_ONCE] = {beside};
    JDIMENSION read = 0;

    if (region.upper > margin_y)
        skip_to(info, region.upper - margin_y, block_height);
    while (info->output_scanline < info->output_height) {
        JDIMENSION here = info->output_scanline, to_next_block = block_height - here % block_height;
        JDIMENSION wanted = to_next_block < ROWS_AT_ONCE ? to_next_block : ROWS_AT_ONCE;
        for (JDIMENSION i = 0; i < wanted; i++) {
            JDIMENSION y = here + i;
            rows[i] = region.upper <= y && y < region.lower ? strip + (y - region.upper) * row_size + offset : beside;
        }
        read = jpeg_read_scanlines(info, rows, wanted);
        if (info->output_scanline >= region.lower)
            skip_to(info, info->output_height - 1, block_height);
    }
    if (read == 0 || is_grey(rows[read - 1] + (size_t)(region.left - first) * 3, (size_t)(region.right - region.left) * 3))
        return refuse(errors, "the last row is mid-grey");
    return 1;
}

/* 0, with a text in errors, where that cannot be, or where it takes a whole decode to judge. */
static int decode(const unsigned char *content, size_t length, Region region, JSAMPLE *strip, Errors *errors) {
    struct jpeg_decompress_struct info;
    int sound = 0;
    info.err = jpeg_std_error(&errors->base);
    errors->base.error_exit = stumble;
    errors->base.emit_message = stumble_on_warnings;
    if (setjmp(errors->stumbled)) {
        jpeg_destroy_decompress(&info);
        return 0;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, content, (unsigned long)length);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = JCS_RGB;
    if (info.image_width != region.width || info.image_height != region.height)
        refuse(errors, "the picture has another size");
    else if (info.progressive_mode || info.arith_code || info.num_components != 3 || jpeg_has_multiple_scans(&info))
        refuse(errors, "not a baseline JPEG of three colours in one scan");
    else {
        jpeg_start_decompress(&info);
        sound = read_rows(&info, region, strip, errors);
        if (sound)
            jpeg_finish_decompress(&info);
    }
    jpeg_destroy_decompress(&info); /* frees the rows, too, and so does it after a stumble */
    return sound;
}

static PyObject *decode_region(PyObject *module, PyObject *arguments) {
    Py_buffer content, strip;
    int width, height, left, upper, right, lower, sound = 0;
    Errors errors;
    if (!PyArg_ParseTuple(arguments, "y*(ii)(iiii)w*", &content, &width, &height, &left, &upper, &right, &lower, &strip))
        return NULL;
    if (left < 0 || upper < 0 || right <= left || lower <= upper || right > width || lower > height || width > JPEG_MAX_DIMENSION
        || strip.len != (Py_ssize_t)(lower - upper) * width * 3) {
        refuse(&errors, "the rectangle, the picture and the room for its pixels do not fit each other");
    } else {
        Region region = {(JDIMENSION)width, (JDIMENSION)height, (JDIMENSION)left, (JDIMENSION)upper, (JDIMENSION)right, (JDIMENSION)lower};
        Py_BEGIN_ALLOW_THREADS
        sound = decode(content.buf, (size_t)content.len, region, strip.buf, &errors);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&content);
    PyBuffer_Release(&strip);
    if (!sound) {
        PyErr_SetString(PyExc_ValueError, errors.text);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"decode_region", decode_region, METH_VARARGS,
     "decode_region(content, (width, height), (left, upper, right, lower), strip): decode this rectangle of a JPEG of this size into its "
     "columns of a writable buffer [lower - upper, width, 3]; the others' values are left undefined. Raises ValueError where the picture "
     "needs another decoder."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_jpeg_region", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpeg_region(void) {
    return PyModule_Create(&definition);
}
