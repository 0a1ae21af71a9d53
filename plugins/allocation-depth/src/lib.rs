//! `qemu:allocation-depth`: how far down the backing chain the bytes are. Status 0: nowhere; 1: in
//! the image itself; more: in that many images further down. The host works it out by itself, from
//! the rule; one that does not know rules asks for every range.

#![forbid(unsafe_code)]

use outport_sdk::{
    ByteRange, Context, ContextProvider, ContextRules, Info, Keep, NodeView, Result, Rule, Span,
    Status,
};

/// The only context.
const NAME: &str = "qemu:allocation-depth";

/// It has no state.
#[derive(Debug)]
pub struct AllocationDepth;

impl ContextProvider for AllocationDepth {
    fn info() -> Info {
        Info {
            name: "allocation-depth",
            version: env!("CARGO_PKG_VERSION"),
            description: "qemu:allocation-depth, how far down the backing chain the bytes are",
            options_schema: "",
        }
    }

    fn open(_view: &dyn NodeView, _options: &str) -> Result<Self> {
        Ok(Self)
    }

    fn contexts(&mut self, _view: &dyn NodeView) -> Result<Vec<Context>> {
        Ok(vec![Context {
            name: NAME.to_owned(),
            wide: false,
            description: "How far down the backing chain the bytes are".to_owned(),
        }])
    }

    fn block_status(
        &mut self,
        view: &dyn NodeView,
        _context: &str,
        range: ByteRange,
        max_spans: u32,
    ) -> Result<Status> {
        let runs = view.allocation(range, max_spans)?;
        let spans = runs.into_iter().map(|run| Span {
            len: run.len,
            status: u64::from(run.depth),
        });
        Ok(Status::collect(spans, max_spans, Keep::UntilWrite))
    }
}

impl ContextRules for AllocationDepth {
    fn rule(&mut self, _context: &str) -> Result<Option<Rule>> {
        Ok(Some(Rule::AllocationDepth))
    }
}

#[cfg(target_arch = "wasm32")]
outport_sdk::export_contexts!(AllocationDepth, rules);

#[cfg(test)]
mod tests {
    use super::*;
    use outport_sdk::testing::{TestProvider, TestView};
    use outport_sdk::{Alloc, AllocRun};

    #[test]
    fn runs_of_one_depth_are_one_span() {
        let run = |len, state, depth| AllocRun { len, state, depth };
        let mut view = TestView::new(600);
        view.runs = vec![
            run(100, Alloc::Data, 1),
            run(100, Alloc::Zero, 1),
            run(100, Alloc::Data, 2),
            run(100, Alloc::Zero, 2),
            run(200, Alloc::Hole, 0),
        ];
        for max in [1, 2, 100] {
            let mut provider =
                TestProvider::<AllocationDepth>::open(view.clone(), "{}").expect("it opens");
            let spans = provider.status(NAME, ByteRange::new(50, 550), max);
            let spans: Vec<_> = spans
                .expect("it answers")
                .iter()
                .map(|span| (span.len, span.status))
                .collect();
            assert_eq!(spans, [(150, 1), (200, 2), (200, 0)]);
        }
    }
}
