//! Several changes that happen all or not at all (QEMU's `transaction.json`).

use super::Empty;

qapi! {
    /// Changes that the daemon can make so.
    enum TransactionActionKind {
        /// Fail: for tests of what comes before it.
        Abort = "abort",
    }

    /// A change without options, under `data`.
    struct AbortWrapper {
        /// Nothing.
        data: Empty,
    }

    /// A change.
    union TransactionAction / #[doc = "Kinds of change, with their options."]
        TransactionActionBranch on "type": TransactionActionKind {} {
        /// Fail.
        Abort(AbortWrapper) = "abort",
    }

    /// What happens to the jobs of a transaction when one of them fails.
    enum ActionCompletionMode {
        /// Nothing.
        Individual = "individual",
        /// They are cancelled.
        Grouped = "grouped",
    }

    /// What holds for all changes.
    #[derive(Default)]
    struct TransactionProperties {
        /// What happens to jobs; `individual` if absent.
        completion_mode: Option<ActionCompletionMode> = "completion-mode",
    }

    /// Arguments of `transaction`.
    struct Transaction {
        /// The changes, in order.
        actions: Vec<TransactionAction>,
        /// What holds for all of them.
        properties: Option<TransactionProperties>,
    }
}
