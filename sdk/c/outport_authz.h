/* A policy in C: the contract of world `authz` (wit/authz.wit) as structs and functions.
 *
 * Include this in one file, define the functions that it declares, and build:
 *
 *   clang --target=wasm32 -O2 -ffreestanding -nostdlib -Wl,--no-entry policy.c -o policy.wasm
 *   outport-plugin-build policy.wasm --world authz -o my-policy.wasm
 *
 * There is no libc: a plugin has no system. Memory from `outport_alloc`, and what the host hands
 * over, is taken back when the call is over; what must live longer is static.
 *
 * Natively (without __wasm__) the same file compiles for tests, which call the functions.
 */
#ifndef OUTPORT_AUTHZ_H
#define OUTPORT_AUTHZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* UTF-8, not terminated. */
typedef struct {
    const char *data;
    size_t len;
} outport_string;

typedef struct {
    bool is_some;
    outport_string value;
} outport_option_string;

typedef struct {
    bool is_some;
    uint32_t value;
} outport_option_u32;

typedef struct {
    outport_string name, version, description;
    /* JSON Schema of the options; empty: takes none. */
    outport_string options_schema;
} outport_info;

enum { OUTPORT_NBD_TCP, OUTPORT_NBD_UNIX, OUTPORT_VHOST_USER_BLK, OUTPORT_FUSE, OUTPORT_QMP };

typedef struct {
    uint8_t transport;
    outport_string identity;
    outport_option_string tls_issuer, tls_fingerprint;
    struct {
        const outport_string *data;
        size_t len;
    } tls_san;
    outport_option_string psk_user, address;
    outport_option_u32 uid, gid, pid;
} outport_peer;

typedef struct {
    outport_peer peer;
    outport_option_string export_name;
    bool wants_write;
    uint64_t now_ms;
} outport_request;

/* 0 stands for no limit. */
typedef struct {
    bool read_only;
    uint64_t ttl_ms;
    uint32_t max_iops;
    uint64_t max_bytes_per_sec;
} outport_grant;

typedef struct {
    uint8_t is_deny;
    union {
        outport_grant allow;
        outport_string deny;
    };
} outport_decision;

enum {
    OUTPORT_EPERM, OUTPORT_ENOENT, OUTPORT_EIO, OUTPORT_ENOMEM, OUTPORT_EACCES, OUTPORT_EBUSY,
    OUTPORT_EEXIST, OUTPORT_EINVAL, OUTPORT_EFBIG, OUTPORT_ENOSPC, OUTPORT_EROFS, OUTPORT_ENOTSUP,
    OUTPORT_EOVERFLOW, OUTPORT_EBADMSG, OUTPORT_ESHUTDOWN, OUTPORT_ECANCELED
};

typedef struct {
    uint8_t code;
    outport_string message;
} outport_error;

/* === What the plugin defines. False: `error` says why, which is a denial. === */

outport_info policy_describe(void);
bool policy_open(outport_string options, outport_error *error);
bool policy_is_allowed(outport_string identity, bool *allowed, outport_error *error);
bool policy_decide(const outport_request *request, outport_decision *decision,
                   outport_error *error);

/* === What it may call === */

/* A file that the operator granted under this name; false: `error` says why. */
bool outport_read_file(outport_string name, outport_string *content, outport_error *error);

/* Memory until the end of the call; NULL: there is no more. */
void *outport_alloc(size_t size);

static inline outport_string outport_text(const char *text) {
    size_t len = 0;
    while (text[len]) {
        len++;
    }
    return (outport_string){text, len};
}

#ifdef __wasm__

/* === The canonical ABI of the component model === */

#define OUTPORT_EXPORT(name) __attribute__((export_name("outport:plugin/" name)))

typedef struct {
    uint8_t is_err;
    union {
        outport_error err;
    };
} outport_result_unit;

typedef struct {
    uint8_t is_err;
    union {
        bool ok;
        outport_error err;
    };
} outport_result_bool;

typedef struct {
    uint8_t is_err;
    union {
        outport_decision ok;
        outport_error err;
    };
} outport_result_decision;

typedef struct {
    uint8_t is_err;
    union {
        outport_string ok;
        outport_error err;
    };
} outport_result_bytes;

extern unsigned char __heap_base;
static size_t outport_top;

void *outport_alloc(size_t size) {
    size_t base = (size_t)&__heap_base;
    size_t at = ((outport_top ? outport_top : base) + 15) & ~(size_t)15;
    size_t have = __builtin_wasm_memory_size(0) * 65536;
    if (size > SIZE_MAX - at) {
        return NULL;
    }
    if (at + size > have) {
        size_t pages = (at + size - have + 65535) / 65536;
        if (__builtin_wasm_memory_grow(0, pages) == (size_t)-1) {
            return NULL;
        }
    }
    outport_top = at + size;
    return (void *)at;
}

__attribute__((export_name("cabi_realloc"))) void *outport_realloc(void *old, size_t old_size,
                                                                    size_t align, size_t size) {
    (void)align;
    unsigned char *fresh = outport_alloc(size);
    if (!fresh) {
        __builtin_trap();
    }
    for (size_t i = 0; i < old_size && i < size; i++) {
        fresh[i] = ((unsigned char *)old)[i];
    }
    return fresh;
}

__attribute__((import_module("outport:plugin/config-files@0.1.0"), import_name("read"))) void
outport_import_read(const char *name, size_t len, outport_result_bytes *result);

bool outport_read_file(outport_string name, outport_string *content, outport_error *error) {
    outport_result_bytes result;
    outport_import_read(name.data, name.len, &result);
    if (result.is_err) {
        *error = result.err;
        return false;
    }
    *content = result.ok;
    return true;
}

/* Answers lie here until the host has read them. */
static outport_info outport_told;
static outport_result_unit outport_opened;
static outport_result_bool outport_admitted;
static outport_result_decision outport_decided;

OUTPORT_EXPORT("meta@0.1.0#describe") outport_info *outport_describe(void) {
    outport_told = policy_describe();
    return &outport_told;
}

OUTPORT_EXPORT("authz-policy@0.1.0#open")
outport_result_unit *outport_open(const char *data, size_t len) {
    outport_opened.is_err = !policy_open((outport_string){data, len}, &outport_opened.err);
    return &outport_opened;
}

OUTPORT_EXPORT("authz-policy@0.1.0#reconfigure")
outport_result_unit *outport_reconfigure(const char *data, size_t len) {
    return outport_open(data, len);
}

OUTPORT_EXPORT("authz-policy@0.1.0#is-allowed")
outport_result_bool *outport_is_allowed(const char *data, size_t len) {
    outport_error error;
    bool allowed = false;
    bool ok = policy_is_allowed((outport_string){data, len}, &allowed, &error);
    outport_admitted.is_err = !ok;
    if (ok) {
        outport_admitted.ok = allowed;
    } else {
        outport_admitted.err = error;
    }
    return &outport_admitted;
}

OUTPORT_EXPORT("authz-policy@0.1.0#decide")
outport_result_decision *outport_decide(const outport_request *request) {
    outport_error error;
    outport_decision decision;
    bool ok = policy_decide(request, &decision, &error);
    outport_decided.is_err = !ok;
    if (ok) {
        outport_decided.ok = decision;
    } else {
        outport_decided.err = error;
    }
    return &outport_decided;
}

/* The host has read the answer: everything is free again. */
#define OUTPORT_POST(name)                                                                         \
    __attribute__((export_name("cabi_post_outport:plugin/" name)))
OUTPORT_POST("meta@0.1.0#describe") void outport_post_describe(void *at) {
    (void)at;
    outport_top = 0;
}
OUTPORT_POST("authz-policy@0.1.0#open") void outport_post_open(void *at) {
    (void)at;
    outport_top = 0;
}
OUTPORT_POST("authz-policy@0.1.0#reconfigure") void outport_post_reconfigure(void *at) {
    (void)at;
    outport_top = 0;
}
OUTPORT_POST("authz-policy@0.1.0#is-allowed") void outport_post_is_allowed(void *at) {
    (void)at;
    outport_top = 0;
}
OUTPORT_POST("authz-policy@0.1.0#decide") void outport_post_decide(void *at) {
    (void)at;
    outport_top = 0;
}

/* What the compiler may call for copying structs; there is no libc. */
void *memcpy(void *restrict to, const void *restrict from, size_t len) {
    unsigned char *t = to;
    const unsigned char *f = from;
    while (len--) {
        *t++ = *f++;
    }
    return to;
}
void *memset(void *to, int byte, size_t len) {
    unsigned char *t = to;
    while (len--) {
        *t++ = (unsigned char)byte;
    }
    return to;
}

#endif /* __wasm__ */
#endif
