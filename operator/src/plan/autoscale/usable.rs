//! Which reports can be judged.

use kvasir_crds::LoadReport;
use kvasir_crds::load_report::{BlockCounts, QueueCounts, SCHEMA};

/// A report whose engine has not beaten for so long is none.
const STALE_MS: u64 = 10_000;

/// The two figures without which a report says nothing.
pub(super) struct Usable<'a> {
    pub(super) report: &'a LoadReport,
    pub(super) blocks: BlockCounts,
    pub(super) queue: QueueCounts,
}

/// A report that can be judged, of a replica that serves. One without blocks or queue is as good as none, and so is one of
/// another schema, or one whose engine doesn't beat any more.
pub(super) fn usable(report: &LoadReport) -> Option<Usable<'_>> {
    let is_fresh = report.heartbeat_age_ms.is_none_or(|age| age < STALE_MS);
    let is_known = report.schema.is_none_or(|schema| schema == SCHEMA);
    let (blocks, queue) = (report.blocks?, report.queue?);
    (is_fresh && is_known && blocks.total > 0).then_some(Usable {
        report,
        blocks,
        queue,
    })
}
