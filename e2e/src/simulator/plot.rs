//! Plots as SVG, readable on light and on dark ground.

use std::fmt::Write as _;

use super::report::rows;
use super::{Cell, Row};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 236.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 40.0;

/// Text and axes follow the reader's colour scheme; the colours of the lines are told apart on both.
const STYLE: &str = "<style>
text { font: 12px sans-serif; fill: #24292f } .axis { stroke: #57606a; stroke-width: 1 } .grid { stroke: #d0d7de; stroke-width: 0.5 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .axis { stroke: #9198a1 } .grid { stroke: #3d444d } }
</style>";
const COLOURS: [&str; 4] = ["#d9480f", "#1c7ed6", "#2b8a3e", "#868e96"];

/// The replicas asked for over time: ours, the clairvoyant's and the best headroom's.
#[must_use]
pub fn series(cell: &Cell) -> String {
    let shown: [&Row; 3] = [&cell.clairvoyant, &cell.headroom, &cell.kvasir];
    let last = |row: &Row| row.outcome.series.last().map_or(1.0, |(at, ..)| *at);
    let most = |row: &Row| row.outcome.series.iter().map(|(_, n, _)| *n).max();
    let end = shown.iter().map(|row| last(row)).fold(1.0, f64::max);
    let high = shown.iter().filter_map(|row| most(row)).max().unwrap_or(1);
    let axes = Axes {
        title: format!(
            "{}, starts of {} s: replicas asked for",
            cell.load, cell.start_s
        ),
        x: ("minutes", 0.0, end / 60.0),
        y: ("replicas", 0.0, f64::from(high) * 1.05),
    };
    let mut svg = axes.begin();
    for (n, row) in shown.iter().enumerate() {
        // In the order of the legend: ours is drawn last.
        let colour = COLOURS[2 - n];
        let mut points = String::new();
        let mut before: Option<u32> = None;
        for &(at, asked, _) in &row.outcome.series {
            if before == Some(asked) && at < end {
                continue;
            }
            let x = axes.x_of(at / 60.0);
            if let Some(before) = before {
                let _ = write!(points, "{x:.1},{:.1} ", axes.y_of(before.into()));
            }
            let _ = write!(points, "{x:.1},{:.1} ", axes.y_of(asked.into()));
            before = Some(asked);
        }
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{points}\"/>"
        );
    }
    for (n, row) in shown.iter().rev().enumerate() {
        let share = row.outcome.attainment * 100.0;
        let label = format!("{}: {share:.1} % in time", row.policy);
        legend(&mut svg, n, COLOURS[n], &label);
    }
    svg + "</svg>\n"
}

/// Requests in time against replica-hours, each policy a point.
#[must_use]
pub fn scatter(cell: &Cell) -> String {
    let rows = rows(cell);
    let hours = rows.iter().map(|row| row.outcome.replica_hours);
    let most = hours.fold(0.0, f64::max);
    let attainments = rows.iter().map(|row| row.outcome.attainment);
    let least = attainments.fold(1.0, f64::min);
    let axes = Axes {
        title: format!(
            "{}, starts of {} s: requests in time and what they cost",
            cell.load, cell.start_s
        ),
        x: ("replica-hours", 0.0, most * 1.05),
        y: ("% in time", (least * 100.0 - 2.0).max(0.0), 100.0),
    };
    let mut svg = axes.begin();
    for (n, row) in rows.iter().enumerate() {
        let colour = COLOURS[n.min(3)];
        let (x, y) = (
            axes.x_of(row.outcome.replica_hours),
            axes.y_of(row.outcome.attainment * 100.0),
        );
        let _ = writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{:.1}\" font-size=\"10\">{n}</text>",
            x + 6.0,
            y - 4.0
        );
        legend(&mut svg, n, colour, &format!("{n} {}", row.policy));
    }
    svg + "</svg>\n"
}

fn legend(svg: &mut String, n: usize, colour: &str, label: &str) {
    let (x, y) = (WIDTH - RIGHT + 14.0, TOP + 8.0 + n as f64 * 17.0);
    let label = label.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        svg,
        "<rect x=\"{x}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"{:.1}\">{label}</text>",
        y - 9.0,
        x + 15.0,
        y
    );
}

struct Axes {
    title: String,
    x: (&'static str, f64, f64),
    y: (&'static str, f64, f64),
}

impl Axes {
    fn x_of(&self, value: f64) -> f64 {
        let (_, low, high) = self.x;
        LEFT + (value - low) / (high - low).max(1e-9) * (WIDTH - LEFT - RIGHT)
    }

    fn y_of(&self, value: f64) -> f64 {
        let (_, low, high) = self.y;
        HEIGHT - BOTTOM - (value - low) / (high - low).max(1e-9) * (HEIGHT - TOP - BOTTOM)
    }

    fn begin(&self) -> String {
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n{STYLE}\n<text x=\"{LEFT}\" y=\"18\">{}</text>\n",
            self.title
        );
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for step in 0..=4 {
            let share = f64::from(step) / 4.0;
            let x = self.x.1 + share * (self.x.2 - self.x.1);
            let y = self.y.1 + share * (self.y.2 - self.y.1);
            let (at_x, at_y) = (self.x_of(x), self.y_of(y));
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at_y:.1}\" y2=\"{at_y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{y:.1}</text>\
                 <text x=\"{at_x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{x:.1}</text>",
                LEFT - 6.0,
                at_y + 4.0,
                bottom + 16.0
            );
        }
        let _ = writeln!(
            svg,
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
             <line class=\"axis\" x1=\"{LEFT}\" x2=\"{LEFT}\" y1=\"{TOP}\" y2=\"{bottom}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text><text x=\"4\" y=\"{:.1}\">{}</text>",
            f64::midpoint(LEFT, right),
            HEIGHT - 6.0,
            self.x.0,
            TOP - 6.0,
            self.y.0
        );
        svg
    }
}
