//! What cannot be read or is refused: counted, and told once.

use super::*;

impl FolderSource {
    pub(super) fn count(&mut self, trouble: &Trouble, more: bool) {
        let (faults, never) = (trouble.faults.len(), usize::from(!trouble.good.ever));
        if more {
            self.trouble.faults.fetch_add(faults, Ordering::Relaxed);
            self.trouble.never += never;
        } else {
            self.trouble.faults.fetch_sub(faults, Ordering::Relaxed);
            self.trouble.never -= never;
        }
    }

    /// Says what is new, once.
    pub(super) fn tell(&self, id: u32, name: &OsStr, before: Option<&Trouble>, now: Option<&Trouble>) {
        let file = || self.path(id).join(name);
        let Some(now) = now else {
            if before.is_some() {
                tracing::info!(file = %file().display(), "the manifest is without fault again");
            }
            return;
        };
        let known = before.map(|trouble| &*trouble.faults).unwrap_or_default();
        let mut new = now.faults.iter().filter(|fault| !known.contains(fault));
        for Fault { document, reason } in new.by_ref().take(MAX_LOGGED) {
            let file = file();
            match document {
                0 => tracing::warn!(file = %file.display(), reason, "a manifest cannot be read"),
                _ => tracing::warn!(file = %file.display(), document, reason, "a manifest has a fault"),
            }
        }
        let more = new.count();
        if more > 0 {
            tracing::warn!(file = %file().display(), more, "a manifest has more faults");
        }
    }

    pub(super) fn set_dir_trouble(&mut self, id: u32, reason: &str) {
        if self.dir(id).is_none_or(|dir| dir.trouble.as_deref() == Some(reason)) {
            return;
        }
        self.clear_dir_trouble(id);
        tracing::warn!(folder = %self.path(id).display(), reason, "a folder of manifests cannot be read");
        if let Some(dir) = self.dir_mut(id) {
            dir.trouble = Some(reason.into());
            let never = usize::from(!dir.listed);
            self.trouble.never += never;
            self.trouble.faults.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether there was trouble.
    pub(super) fn clear_dir_trouble(&mut self, id: u32) -> bool {
        let Some(dir) = self.dir_mut(id) else { return false };
        let never = usize::from(!dir.listed);
        let was = dir.trouble.take().is_some();
        if was {
            self.trouble.never -= never;
            self.trouble.faults.fetch_sub(1, Ordering::Relaxed);
        }
        was
    }
}
