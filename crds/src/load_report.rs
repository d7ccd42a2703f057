//! What a replica reports at `/load`, and the operator's autoscaler reads. It owns the names and units of the raw
//! counts; it knows no policy: what counts as demand or as capacity is the reader's to decide.
//!
//! Only additive changes are allowed: readers ignore fields that they don't know, and a field that is missing
//! is *unknown*, never zero.

use serde::{Deserialize, Serialize};

/// The version of this schema, in [`LoadReport::schema`]. It rises only with a change that is not additive.
pub const SCHEMA: u32 = 1;

/// One replica's load at one moment, as raw counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadReport {
    /// [`SCHEMA`] of the replica that reports.
    pub schema: Option<u32>,
    /// Differs between two starts of the same pod, so that counters which restart are seen as such.
    pub boot_id: Option<String>,
    /// Rises by one with each engine step that is reported.
    pub sequence: Option<u64>,
    /// Age of the engine's last heartbeat in milliseconds. The heartbeat beats at each step, and while idle.
    pub heartbeat_age_ms: Option<u64>,
    /// The replica was told to stop: neither supply nor demand.
    pub draining: Option<bool>,
    /// The KV block pool.
    pub blocks: Option<BlockCounts>,
    /// What a sequence takes of the pool.
    pub page_demand: Option<PageDemand>,
    /// Sequence slots.
    pub slots: Option<SlotCounts>,
    /// Requests that wait and that run.
    pub queue: Option<QueueCounts>,
    /// Prompt tokens accepted whose KV isn't computed yet, over waiting and running requests. A token is computed once:
    /// one that a prefix hit brings is not in the backlog.
    pub prefill_backlog_tokens: Option<u64>,
    /// Sequences preempted since the start.
    pub preemptions: Option<u64>,
    /// Counts since the start: how much they rise between two reports is a rate.
    pub totals: Option<TotalCounts>,
    /// Demand that waits outside of any replica, at whoever reports it (a front door that holds requests while none
    /// serves). A report of nothing else is no replica's.
    pub held: Option<HeldCounts>,
    /// What is served, and what it takes.
    pub model: Option<ModelReport>,
    /// How the start goes, or went.
    pub start: Option<StartReport>,
}

/// A model on its device, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelReport {
    /// Numbers that the model learned.
    pub parameters: Option<u64>,
    /// Bytes of its weights on the device.
    pub weights_bytes: Option<u64>,
    /// Bytes of the device's workspace.
    pub workspace_bytes: Option<u64>,
    /// Bytes of the KV cache.
    pub kv_cache_bytes: Option<u64>,
    /// Bytes of the KV cache that a token of a long sequence takes.
    pub kv_bytes_per_token: Option<u64>,
    /// Blocks of the pool.
    pub blocks: Option<u64>,
    /// The longest context in tokens, prompt and answer together.
    pub max_model_len: Option<u64>,
    /// Sequences of that length that the pool holds at once.
    pub requests_at_context: Option<u64>,
    /// The commit of its repository, where it came from one.
    pub revision: Option<String>,
}

/// What a replica does before it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StartPhase {
    /// It fetches the model's files.
    Fetch,
    /// It reads the weights onto the device.
    Load,
    /// It allocates the KV cache and starts the engine.
    WarmUp,
    /// One that this reader doesn't know.
    #[serde(other)]
    Other,
}

/// How a start goes, or went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StartReport {
    /// What goes on; absent once the replica serves.
    pub phase: Option<StartPhase>,
    /// Bytes that the phase has come to, of [`StartReport::total_bytes`].
    pub done_bytes: Option<u64>,
    /// Bytes that the phase has to do with.
    pub total_bytes: Option<u64>,
    /// How long fetching took; absent where nothing had to be.
    pub fetch_ms: Option<u64>,
    /// How long loading took.
    pub load_ms: Option<u64>,
    /// How long the rest took.
    pub warm_up_ms: Option<u64>,
}

impl StartReport {
    /// How far the phase has come.
    #[must_use]
    pub fn percent(&self) -> Option<u8> {
        let (done, total) = self
            .done_bytes
            .zip(self.total_bytes.filter(|total| *total > 0))?;
        let percent = u128::from(done) * 100 / u128::from(total);
        Some(u8::try_from(percent.min(100)).unwrap_or(100))
    }
}

/// Blocks of the pool by state: `total = active + cached + free`, never two states at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockCounts {
    /// Token slots in a block.
    pub block_size: u32,
    /// All blocks of the pool.
    pub total: u64,
    /// Held by at least one sequence.
    pub active: u64,
    /// Held by no sequence, kept for their content, evictable at once. Demand counts them as free.
    pub cached: u64,
    /// Empty.
    pub free: u64,
    /// Blocks that the prompts of the waiting requests need, beyond what they share.
    pub waiting_need: u64,
}

/// What a sequence takes of the pool, so that others can turn tokens into demand: a sequence of `n` tokens needs
/// `per_sequence + per_token_block * ceil(n / block_size)` pages, with [`BlockCounts::block_size`] and counted in the pages
/// of [`BlockCounts`].
///
/// A model of one kind of layer has 0 and 1. One with several cache groups (local and global attention) takes a page for
/// each group and block of tokens, and this counts a windowed group as if nothing of it were freed: an upper bound. One
/// with recurrent layers also takes pages for their state, however long the sequence is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PageDemand {
    /// Pages that each sequence holds, however short it is.
    pub per_sequence: Option<u64>,
    /// Pages that each begun block of `block_size` tokens needs.
    pub per_token_block: Option<u64>,
}

/// Sequence slots: what the batch can hold at once. A request for several answers takes several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SlotCounts {
    /// Slots that a sequence of the running batch holds.
    pub running: Option<u64>,
    /// All slots: the most sequences that run at once.
    pub limit: Option<u64>,
    /// Output tokens that the sequences of the running batch have by now.
    pub generated_tokens: Option<u64>,
}

/// Counts since the start of the replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TotalCounts {
    /// Prompt tokens whose KV was computed, those of recomputed sequences again.
    pub prompt_tokens: Option<u64>,
    /// Output tokens.
    pub generated_tokens: Option<u64>,
    /// Sequences that ended.
    pub ended_sequences: Option<u64>,
}

/// Requests that are held for a deployment and that no replica knows of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HeldCounts {
    /// Requests.
    pub requests: Option<u64>,
    /// Tokens of their prompts.
    pub prompt_tokens: Option<u64>,
    /// Age of the oldest in milliseconds; 0 where none is held.
    pub oldest_ms: Option<u64>,
}

/// Requests by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct QueueCounts {
    /// Requests in the running batch.
    pub running: u64,
    /// Requests accepted and not running, preempted ones included.
    pub waiting: u64,
    /// The most requests that may wait before the replica answers 429.
    pub waiting_limit: u64,
    /// Age of the oldest waiting request in milliseconds; 0 where none waits.
    pub oldest_waiting_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_are_ignored_and_missing_ones_stay_unknown() {
        let report: LoadReport = serde_json::from_str(
            r#"{"schema":1,"novel":3,"blocks":{"total":7},"slots":{"running":2}}"#,
        )
        .unwrap();
        assert_eq!(report.blocks.map(|b| b.total), Some(7));
        assert_eq!(report.queue, None, "missing is unknown, not zero");
        assert_eq!(report.page_demand, None, "a replica of before the field");
        let slots = report.slots.unwrap();
        assert_eq!((slots.running, slots.limit), (Some(2), None));
        assert_eq!((report.totals, report.held), (None, None));
        let start: StartReport =
            serde_json::from_str(r#"{"phase":"compile","totalBytes":0,"doneBytes":0}"#).unwrap();
        assert_eq!(start.phase, Some(StartPhase::Other), "of a newer replica");
        assert_eq!(start.percent(), None);
    }

    #[test]
    fn names_on_the_wire() {
        let report = LoadReport {
            page_demand: Some(PageDemand {
                per_sequence: Some(0),
                per_token_block: Some(1),
            }),
            slots: Some(SlotCounts {
                running: Some(3),
                limit: Some(64),
                generated_tokens: Some(90),
            }),
            prefill_backlog_tokens: Some(5),
            totals: Some(TotalCounts {
                prompt_tokens: Some(7),
                generated_tokens: Some(8),
                ended_sequences: Some(9),
            }),
            held: Some(HeldCounts {
                requests: Some(1),
                prompt_tokens: Some(2),
                oldest_ms: Some(3),
            }),
            start: Some(StartReport {
                phase: Some(StartPhase::WarmUp),
                done_bytes: Some(2),
                total_bytes: Some(3),
                ..StartReport::default()
            }),
            model: Some(ModelReport {
                kv_bytes_per_token: Some(8),
                ..ModelReport::default()
            }),
            ..LoadReport::default()
        };
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["pageDemand"]["perSequence"], 0);
        assert_eq!(json["pageDemand"]["perTokenBlock"], 1);
        assert_eq!(json["slots"]["running"], 3);
        assert_eq!(json["slots"]["limit"], 64);
        assert_eq!(json["slots"]["generatedTokens"], 90);
        assert_eq!(json["prefillBacklogTokens"], 5);
        assert_eq!(json["totals"]["promptTokens"], 7);
        assert_eq!(json["totals"]["generatedTokens"], 8);
        assert_eq!(json["totals"]["endedSequences"], 9);
        assert_eq!(json["held"]["requests"], 1);
        assert_eq!(json["held"]["promptTokens"], 2);
        assert_eq!(json["held"]["oldestMs"], 3);
        assert_eq!(json["start"]["phase"], "warmUp");
        assert_eq!(json["model"]["kvBytesPerToken"], 8);
        assert_eq!(report.start.and_then(|start| start.percent()), Some(66));
        let back: LoadReport = serde_json::from_value(json).unwrap();
        assert_eq!(back, report);
    }
}
