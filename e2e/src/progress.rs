//! Tells the person at the terminal what happens, how long it takes and where things are kept.
//! Everything goes to standard error: standard output is for answers.

use std::fmt::Display;
use std::io::Write as _;
use std::time::Instant;

/// Says that something long begins; the returned step says how it ended.
#[must_use]
pub fn begin(what: impl Display) -> Step {
    say(format_args!("==> {what}"));
    Step {
        started: Instant::now(),
    }
}

/// One line, as it is. Written past the test harness's capture, so that it is seen while tests run.
pub fn say(line: impl Display) {
    // A closed terminal is no reason to stop bringing a cluster up.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Something under way.
pub struct Step {
    started: Instant,
}

impl Step {
    /// It is done; `outcome` says with what result.
    pub fn done(self, outcome: impl Display) {
        say(format_args!(
            "    {outcome} ({:.1} s)",
            self.started.elapsed().as_secs_f64()
        ));
    }
}
