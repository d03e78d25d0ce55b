//! How many requests an agent has under way.

use std::time::Duration;

/// As many as the proxies of a node have.
const FIRST: usize = 8;
/// From here on, one more at once makes none of them cheaper.
pub const MOST: usize = 32;
/// An authority whose answers take longer has others waiting.
const PROMPT: Duration = Duration::from_millis(100);

/// How many requests may be under way at once: 8 at first, twice as many once all of them were answered promptly, up to
/// 32, and 8 again once one fails. So one agent is served fast, and the agents of all nodes, which begin together when a
/// cluster does, do not crowd an authority that is slower for it.
pub struct Window {
    size: usize,
    /// The prompt answers since it grew, or since one that was not.
    prompt: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self { size: FIRST, prompt: 0 }
    }
}

impl Window {
    /// So many requests may be under way.
    pub fn size(&self) -> usize {
        self.size
    }

    /// A certificate came, so long after it was asked for.
    pub fn answered(&mut self, after: Duration) {
        self.prompt = if after <= PROMPT { self.prompt + 1 } else { 0 };
        if self.prompt >= self.size {
            *self = Self { size: (self.size * 2).min(MOST), prompt: 0 };
        }
    }

    /// None came.
    pub fn failed(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_with_prompt_answers_alone_and_begins_again_after_a_failure() {
        let mut window = Window::default();
        let mut after = |answers: usize, milliseconds: u64| {
            (0..answers).for_each(|_| window.answered(Duration::from_millis(milliseconds)));
            window.size()
        };
        assert_eq!((after(0, 0), after(7, 100), after(1, 100)), (8, 8, 16));
        assert_eq!((after(15, 100), after(1, 101), after(15, 5), after(1, 5)), (16, 16, 16, 32));
        assert_eq!((after(100, 5), after(1, 5_000)), (32, 32));
        window.failed();
        assert_eq!(window.size(), 8);
    }

    /// Agents that begin together, an authority that does one request in 150 us, and a queue that holds 8,192.
    #[test]
    fn a_thousand_agents_crowd_nobody_out() {
        const EACH: Duration = Duration::from_micros(150);
        for agents in [1, 10, 100, 300, 1_000] {
            let mut windows: Vec<Window> = (0..agents).map(|_| Window::default()).collect();
            let mut queue = std::collections::VecDeque::new();
            let mut now = Duration::ZERO;
            (0..FIRST).for_each(|_| queue.extend((0..agents).map(|agent| (agent, now))));
            let mut most = 0;
            for _ in 0..200_000 {
                let (agent, asked) = queue.pop_front().unwrap();
                now += EACH;
                let before = windows[agent].size();
                windows[agent].answered(now - asked);
                for _ in 0..=windows[agent].size() - before {
                    queue.push_back((agent, now));
                }
                most = most.max(queue.len());
            }
            assert!(most <= 8_000, "{agents} agents had {most} under way");
            assert!(agents > 10 || windows.iter().all(|window| window.size() == MOST));
        }
    }
}
