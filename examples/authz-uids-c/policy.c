/* Who may use exports over unix sockets: a file of user ids, in C.
 *
 * The operator grants a file named "uids" with one line for each user: an id, and "ro" behind it
 * for those who may only read. Everybody else is denied, and so is everybody while the file has a
 * line that is neither.
 */
#include "outport_authz.h"

outport_info policy_describe(void) {
    return (outport_info){
        .name = outport_text("authz-uids"),
        .version = outport_text("0.1.0"),
        .description = outport_text("User ids from a file"),
    };
}

bool policy_open(outport_string options, outport_error *error) {
    (void)options;
    (void)error;
    return true;
}

/* A certificate's name is nothing that this policy knows. */
bool policy_is_allowed(outport_string identity, bool *allowed, outport_error *error) {
    (void)identity;
    (void)error;
    *allowed = false;
    return true;
}

/* The text as a number; false: it is none. */
static bool number(outport_string text, uint32_t *value) {
    uint64_t sum = 0;
    for (size_t i = 0; i < text.len; i++) {
        if (text.data[i] < '0' || text.data[i] > '9') {
            return false;
        }
        sum = sum * 10 + (uint64_t)(text.data[i] - '0');
        if (sum > UINT32_MAX) {
            return false;
        }
    }
    *value = (uint32_t)sum;
    return text.len > 0;
}

/* The next word of a line, taken off its front; empty at the end. */
static outport_string word(outport_string *line) {
    while (line->len && (*line->data == ' ' || *line->data == '\t')) {
        line->data++, line->len--;
    }
    outport_string found = {line->data, 0};
    while (line->len && *line->data != ' ' && *line->data != '\t') {
        line->data++, line->len--, found.len++;
    }
    return found;
}

/* The next line, taken off the front; false at the end. */
static bool line(outport_string *text, outport_string *found) {
    if (!text->len) {
        return false;
    }
    *found = (outport_string){text->data, 0};
    while (text->len && *text->data != '\n') {
        text->data++, text->len--, found->len++;
    }
    if (text->len) {
        text->data++, text->len--;
    }
    return true;
}

static bool deny(outport_decision *decision, const char *reason) {
    decision->is_deny = 1;
    decision->deny = outport_text(reason);
    return true;
}

bool policy_decide(const outport_request *request, outport_decision *decision,
                   outport_error *error) {
    outport_string file, entry;
    bool known = false, read_only = false;

    if (!request->peer.uid.is_some) {
        return deny(decision, "There is no user id: this is no unix socket");
    }
    if (!outport_read_file(outport_text("uids"), &file, error)) {
        return false;
    }
    while (line(&file, &entry)) {
        uint32_t uid;
        outport_string id = word(&entry), may = word(&entry);
        if (!id.len) {
            continue;
        }
        bool ro = may.len == 2 && may.data[0] == 'r' && may.data[1] == 'o';
        if (!number(id, &uid) || (may.len && !ro) || word(&entry).len) {
            return deny(decision, "The file has a line that is not UID [ro]");
        }
        if (!known && uid == request->peer.uid.value) {
            known = true;
            read_only = ro;
        }
    }
    if (!known) {
        return deny(decision, "The file does not have this user");
    }
    *decision = (outport_decision){.allow = {.read_only = read_only}};
    return true;
}
