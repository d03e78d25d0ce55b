//! The log, one line an event on standard error, for people or as JSON; and the one form of metric that the library
//! lacks.

use std::cell::Cell;
use std::fmt::{self as std_fmt, Write as _};
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::fmt::format::{FmtSpan, Writer};
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;

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
    let builder = fmt().with_writer(|| Log).with_max_level(level).log_internal_errors(false);
    // A span tells how long it took when it ends.
    let builder = builder.with_span_events(FmtSpan::CLOSE);
    // What goes wrong there Mica tells itself, in its own words.
    let silent = ["kube_client", "kube_runtime"].map(|library| (library, LevelFilter::OFF));
    let filter = Targets::new().with_default(level).with_targets(silent);
    match format {
        LogFormat::Human => builder.with_ansi(terminal).with_target(false).finish().with(filter).init(),
        LogFormat::Json => {
            builder.json().flatten_event(true).map_event_format(Lines).finish().with(filter).init()
        }
    }
}

/// Lines that are not written yet. Nothing waits while it is locked.
static GATHERED: Mutex<Vec<u8>> = Mutex::new(Vec::new());
/// That there are some.
static SOME: Notify = Notify::const_new();
/// Those that are being written. Locked before [`GATHERED`], so that all stay in their order.
static LEAVING: Mutex<Vec<u8>> = Mutex::new(Vec::new());
/// More is written at once.
const MOST_GATHERED: usize = 16 * 1024;
/// A line that is gathered waits no longer for [`flush`].
const PATIENCE: Duration = Duration::from_millis(5);

/// What the line of an issuance fits in.
const USUAL: usize = 512;

thread_local! {
    static GATHERS: Cell<bool> = const { Cell::new(false) };
}

/// What is logged within may wait for [`flush`], and be written together with what other threads log within the same. A
/// line that is logged elsewhere takes it along, so that all stay in their order.
pub fn gather<R>(work: impl FnOnce() -> R) -> R {
    struct End(bool);
    impl Drop for End {
        fn drop(&mut self) {
            GATHERS.set(self.0);
        }
    }
    let _end = End(GATHERS.replace(true));
    work()
}

/// Writes what was gathered.
pub fn flush() {
    // Nobody could be told that it cannot be written.
    let _ = write_out();
}

/// Writes what nobody else does, soon, for ever.
pub async fn keep_flushed() {
    loop {
        SOME.notified().await;
        tokio::time::sleep(PATIENCE).await;
        flush();
    }
}

fn locked(lines: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    lines.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns when all that was gathered before is written, by whomever.
fn write_out() -> io::Result<()> {
    let mut leaving = locked(&LEAVING);
    std::mem::swap(&mut *leaving, &mut *locked(&GATHERED));
    let written = if leaving.is_empty() { Ok(()) } else { io::stderr().write_all(&leaving) };
    leaving.clear();
    written
}

/// Standard error, behind what is gathered.
struct Log;

impl io::Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let (first, length) = {
            let mut lines = locked(&GATHERED);
            let first = lines.is_empty();
            lines.extend_from_slice(line);
            (first, lines.len())
        };
        if !GATHERS.get() || length >= MOST_GATHERED {
            write_out()?;
        } else if first {
            SOME.notify_one();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes an event outside all spans, as each issuance is one, straight into its line; the library's own JSON, which costs
/// several times as much, is for the others. Both write the same.
struct Lines<F>(F);

impl<F, S, N> FormatEvent<S, N> for Lines<F>
where
    F: FormatEvent<S, N>,
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std_fmt::Result {
        if context.parent_span().is_some() {
            return self.0.format_event(context, writer, event);
        }
        let metadata = event.metadata();
        let mut line = String::with_capacity(USUAL);
        line.push_str("{\"timestamp\":\"");
        SystemTime.format_time(&mut Writer::new(&mut line))?;
        for text in ["\",\"level\":\"", metadata.level().as_str(), "\""] {
            line.push_str(text);
        }
        let mut fields = Fields { line, written: Ok(()) };
        event.record(&mut fields);
        let Fields { mut line, written } = fields;
        written?;
        line.push_str(",\"target\":\"");
        escape(&mut line, metadata.target());
        line.push_str("\"}\n");
        writer.write_str(&line)
    }
}

struct Fields {
    line: String,
    written: std_fmt::Result,
}

impl Fields {
    fn name(&mut self, field: &Field) {
        let name = field.name();
        for text in [",\"", name.strip_prefix("r#").unwrap_or(name), "\":"] {
            self.line.push_str(text);
        }
    }

    fn put(&mut self, field: &Field, value: std_fmt::Arguments<'_>) {
        self.name(field);
        self.written = self.written.and(self.line.write_fmt(value));
    }
}

impl Visit for Fields {
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, format_args!("{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, format_args!("{value}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() {
            self.put(field, format_args!("{value:?}"));
        } else {
            self.put(field, format_args!("null"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.name(field);
        self.line.push('"');
        escape(&mut self.line, value);
        self.line.push('"');
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std_fmt::Debug) {
        self.name(field);
        self.line.push('"');
        self.written = self.written.and(write!(Escaped(&mut self.line), "{value:?}"));
        self.line.push('"');
    }
}

/// Escapes what may not stand in a JSON text (RFC 8259 7).
struct Escaped<'a>(&'a mut String);

impl std_fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> std_fmt::Result {
        escape(self.0, text);
        Ok(())
    }
}

fn escape(line: &mut String, text: &str) {
    let is_plain = |byte: u8| byte >= 0x20 && byte != b'"' && byte != b'\\';
    // All of it at once is faster than up to the first, which is hardly ever there.
    if text.bytes().fold(true, |plain, byte| plain & is_plain(byte)) {
        return line.push_str(text);
    }
    for character in text.chars() {
        match character {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            '\0'..' ' => {
                let byte = character as u8;
                line.extend(["\\u00", if byte < 0x10 { "0" } else { "1" }]);
                line.extend(char::from_digit(u32::from(byte & 0x0f), 16));
            }
            other => line.push(other),
        }
    }
}

/// A counter without the `_total` that OpenMetrics asks of counters, hence of the type "unknown": Istio's names stay as
/// they are, so that its dashboards and alerts go on working.
#[derive(Clone, Debug, Default)]
pub struct Unsuffixed(Counter);

impl Unsuffixed {
    /// One more.
    pub fn inc(&self) {
        self.0.inc();
    }
}

impl EncodeMetric for Unsuffixed {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.encode_gauge(&self.0.get())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Unknown
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is written of these events, without the time.
    fn written(ours: bool) -> Vec<(Vec<String>, serde_json::Value)> {
        let kept = Kept::default();
        let place = kept.clone();
        let builder = fmt().with_writer(move || place.clone()).json().flatten_event(true);
        let events = || {
            let evil = "a \"quoted\" \\ line\nand\u{1}\u{8}\u{c}\u{10}\u{1f}\u{7f} é\r\t";
            let nothing: Option<&str> = None;
            tracing::info!(evil, shown = %evil, known = ?evil, nothing, some = Some(4), "one {evil}");
            tracing::warn!(a = -1, b = 2u64, c = true, d = 0.5, e = f64::NAN, f = 1e300, r#type = "x");
            tracing::error!("");
            tracing::info_span!("within", evil).in_scope(|| tracing::info!(evil, "two"));
        };
        match ours {
            true => tracing::subscriber::with_default(builder.map_event_format(Lines).finish(), events),
            false => tracing::subscriber::with_default(builder.finish(), events),
        }
        let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        assert!(text.ends_with('\n'));
        text.lines()
            .map(|line| {
                let names = line.split("\",\"").map(|part| part.split('"').next().unwrap().to_owned());
                let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
                let time = value.as_object_mut().unwrap().remove("timestamp").unwrap();
                assert!(time.as_str().unwrap().ends_with('Z'));
                (names.skip(1).collect(), value)
            })
            .collect()
    }

    #[test]
    fn a_line_is_what_the_library_would_have_written() {
        let (ours, theirs) = (written(true), written(false));
        assert_eq!(ours.len(), 4);
        assert_eq!(ours, theirs);
    }
}
