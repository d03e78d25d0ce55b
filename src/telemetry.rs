//! The log: one line an event on standard error, for people or as JSON.

use std::io::IsTerminal as _;

use tracing::Level;
use tracing_subscriber::fmt;

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Sets up the log of the process. Without a format, people get theirs on a terminal and everything else gets JSON.
pub fn start(format: Option<LogFormat>, level: Level) {
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Human } else { LogFormat::Json });
    // A line that cannot be written, as to a full disk, would otherwise be told on standard error, which panics there.
    let builder = fmt().with_writer(std::io::stderr).with_max_level(level).log_internal_errors(false);
    match format {
        LogFormat::Human => builder.with_ansi(terminal).with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).init(),
    }
}
