/* The policy as a native program, with a file in memory. */
#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "policy.c"

static const char *uids;

bool outport_read_file(outport_string name, outport_string *content, outport_error *error) {
    if (!uids || name.len != 4 || memcmp(name.data, "uids", 4)) {
        *error = (outport_error){OUTPORT_EACCES, outport_text("not granted")};
        return false;
    }
    *content = outport_text(uids);
    return true;
}

/* 'w'rites, 'r'eads, 'd'enied, 'e'rror. */
static char ask(const char *file, long uid) {
    outport_request request = {.peer = {.uid = {uid >= 0, (uint32_t)uid}}, .wants_write = true};
    outport_decision decision;
    outport_error error;
    uids = file;
    if (!policy_decide(&request, &decision, &error)) {
        return 'e';
    }
    return decision.is_deny ? 'd' : decision.allow.read_only ? 'r' : 'w';
}

int main(void) {
    const char *good = "0\n1000 ro\n\n 1001\t\n4294967295 ro";
    assert(ask(good, 0) == 'w');
    assert(ask(good, 1000) == 'r');
    assert(ask(good, 1001) == 'w');
    assert(ask(good, 4294967295) == 'r');
    assert(ask(good, 7) == 'd');
    assert(ask(good, -1) == 'd');
    assert(ask("", 0) == 'd');
    assert(ask(NULL, 0) == 'e');
    assert(ask("5 ro\n5", 5) == 'r'); /* the first line counts */
    const char *mistakes[] = {"0\nroot", "0 rw", "0 ro ro", "4294967296", "0\n-1", "0x0"};
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++) {
        assert(ask(mistakes[i], 0) == 'd');
    }
    puts("ok");
    return 0;
}
