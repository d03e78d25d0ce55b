#![allow(clippy::disallowed_methods, reason = "tests write the files that the source reads")]

use super::*;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Mutex;

/// A source, and what it has told so far.
struct Told {
    source: FolderSource,
    accounts: BTreeSet<String>,
    settled: bool,
    changes: Vec<Change>,
}

impl Told {
    async fn of(root: &Path) -> Self {
        Self::of_source(FolderSource::open(root, &[]).unwrap()).await
    }

    async fn of_source(source: FolderSource) -> Self {
        let mut told = Self { source, accounts: BTreeSet::new(), settled: true, changes: Vec::new() };
        assert!(told.next(Duration::from_secs(10)).await, "the first change comes without waiting");
        told
    }

    /// Takes one change, if there is one in time.
    async fn next(&mut self, within: Duration) -> bool {
        let Ok(change) = tokio::time::timeout(within, self.source.next()).await else { return false };
        for account in &change.added {
            assert!(self.accounts.insert(account.to_string()), "{account} is told twice");
        }
        for account in &change.removed {
            assert!(self.accounts.remove(&account.to_string()), "{account} was never told");
        }
        self.settled = change.settled;
        self.changes.push(change);
        true
    }

    /// Everything that is told until nothing more comes for longer than anything takes.
    async fn rest(&mut self) -> &BTreeSet<String> {
        while self.next(Duration::from_millis(2_900)).await {}
        &self.accounts
    }

    /// Waits until these are the accounts, as long as the contract allows for a change.
    #[track_caller]
    fn expect<'a>(&'a mut self, names: &'a [&'a str]) -> impl Future<Output = ()> + 'a {
        let caller = std::panic::Location::caller();
        async move {
            let wanted: BTreeSet<String> = names.iter().map(|name| format!("default/{name}")).collect();
            let end = Instant::now() + Duration::from_secs(2);
            while self.accounts != wanted {
                let left = end.saturating_duration_since(Instant::now());
                assert!(self.next(left).await, "{caller}: {:?} are told, not {names:?}", self.accounts);
            }
        }
    }

    /// Nothing is told for longer than a removal takes.
    #[track_caller]
    fn expect_silence(&mut self) -> impl Future<Output = ()> + '_ {
        let caller = std::panic::Location::caller();
        async move {
            let told = self.next(Duration::from_millis(2_200)).await;
            assert!(!told, "{caller}: {:?}", self.changes.last());
        }
    }

    /// As many changes as it takes, in any time.
    async fn expect_by_and_by(&mut self, accounts: &BTreeSet<String>, faults: usize) {
        let end = Instant::now() + Duration::from_secs(30);
        while self.accounts != *accounts || self.faults() != faults {
            assert!(Instant::now() < end, "{:?} and {} faults", self.accounts, self.faults());
            self.next(Duration::from_millis(100)).await;
        }
    }

    fn faults(&self) -> usize {
        self.source.faults().load(Ordering::Relaxed)
    }
}

fn manifest(names: &[&str]) -> String {
    names
        .iter()
        .map(|name| format!("---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}}}\n"))
        .collect()
}

fn put(path: impl AsRef<Path>, names: &[&str]) {
    fs::write(path, manifest(names)).unwrap();
}

fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap()
}

#[tokio::test]
async fn the_first_change_tells_everything_there_is() {
    let root = folder();
    let at = root.path();
    fs::create_dir_all(at.join("deep/er")).unwrap();
    fs::create_dir_all(at.join(".hidden")).unwrap();
    put(at.join("a.yaml"), &["a", "shared"]);
    put(at.join("deep/b.yml"), &["b", "shared"]);
    fs::write(
        at.join("deep/er/c.json"),
        r#"{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"c"}}"#,
    )
    .unwrap();
    for passed_over in [".hidden/x.yaml", ".x.yaml", "x.txt", "x.yaml.bak", "x", "yaml"] {
        put(at.join(passed_over), &["x"]);
    }
    let told = Told::of(at).await;
    assert_eq!(told.accounts.len(), 4);
    assert!(told.settled);
    assert_eq!(told.faults(), 0);
    drop(told);

    let empty = folder();
    let told = Told::of(empty.path()).await;
    assert_eq!((told.accounts.len(), told.settled), (0, true));
}

#[tokio::test]
async fn what_is_no_folder_is_refused() {
    let root = folder();
    let none = root.path().join("none");
    assert!(matches!(FolderSource::open(&none, &[]), Err(Error::Missing(path)) if path == none));
    put(&none, &["a"]);
    assert!(matches!(FolderSource::open(&none, &[]), Err(Error::NoFolder(path)) if path == none));
}

#[tokio::test]
async fn files_come_change_move_and_go() {
    let root = folder();
    let at = root.path();
    let mut told = Told::of(at).await;
    put(at.join("a.yaml"), &["a"]);
    told.expect(&["a"]).await;
    put(at.join("a.yaml"), &["a", "b"]);
    told.expect(&["a", "b"]).await;
    fs::create_dir_all(at.join("x/y/z")).unwrap();
    put(at.join("x/y/z/c.json"), &["c"]);
    told.expect(&["a", "b", "c"]).await;
    put(at.join("x/y/z/d.yaml"), &["d", "a"]);
    told.expect(&["a", "b", "c", "d"]).await;

    // Named elsewhere too, or only moved: no account goes.
    fs::remove_file(at.join("a.yaml")).unwrap();
    told.expect(&["a", "c", "d"]).await;
    fs::rename(at.join("x/y"), at.join("moved")).unwrap();
    fs::rename(at.join("moved/z/c.json"), at.join("c.yml")).unwrap();
    told.expect_silence().await;
    put(at.join("moved/z/e.yaml"), &["e"]);
    told.expect(&["a", "c", "d", "e"]).await;
    fs::rename(at.join("moved/z/d.yaml"), at.join("moved/z/d.off")).unwrap();
    told.expect(&["c", "e"]).await;
    fs::remove_dir_all(at.join("moved")).unwrap();
    told.expect(&["c"]).await;
    assert!(told.settled);
}

#[tokio::test]
async fn one_changed_file_is_work_for_its_accounts_alone() {
    let root = folder();
    for i in 0..50 {
        put(root.path().join(format!("{i}.yaml")), &[&format!("a{i}")]);
    }
    let mut told = Told::of(root.path()).await;
    put(root.path().join("7.yaml"), &["a7", "new"]);
    assert!(told.next(Duration::from_secs(2)).await);
    let change = told.changes.last().unwrap();
    assert_eq!(change.added.iter().map(ServiceAccount::name).collect::<Vec<_>>(), ["new"]);
    assert_eq!(change.removed, []);
}

#[tokio::test]
async fn a_file_that_is_replaced_or_rewritten_loses_nothing_meanwhile() {
    let root = folder();
    let file = root.path().join("a.yaml");
    put(&file, &["a", "b"]);
    let mut told = Told::of(root.path()).await;
    for pause in [0, 50, 300, 900] {
        fs::remove_file(&file).unwrap();
        tokio::time::sleep(Duration::from_millis(pause)).await;
        put(&file, &["a", "b"]);
        told.expect_silence().await;
    }
    // A writer that takes its time: nothing is read before it has closed the file.
    use std::io::Write;
    let mut writer = fs::File::create(&file).unwrap();
    let text = manifest(&["a", "b", "cc"]);
    let writing = async {
        for part in text.as_bytes().chunks(text.len() / 6 + 1) {
            writer.write_all(part).unwrap();
            tokio::time::sleep(Duration::from_millis(120)).await;
        }
        drop(writer);
    };
    let listening = async {
        told.expect(&["a", "b", "cc"]).await;
        told.expect_silence().await;
    };
    tokio::join!(writing, listening);
    assert_eq!(told.changes.len(), 2, "{:?}", told.changes);
}

#[tokio::test]
async fn constant_churn_delays_nothing_beyond_the_promise() {
    let root = folder();
    let at = root.path().to_owned();
    let mut told = Told::of(&at).await;
    let churn = async {
        let mut keep_open = fs::File::create(at.join("open.yaml")).unwrap();
        for i in 0.. {
            use std::io::Write;
            keep_open.write_all(b"# more\n").unwrap();
            put(at.join("churn.yaml"), &[&format!("churn-{}", i % 7)]);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let work = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        put(at.join("a.yaml"), &["wanted"]);
        let start = Instant::now();
        while !told.accounts.contains("default/wanted") {
            told.next(Duration::from_secs(5)).await;
        }
        start.elapsed()
    };
    let took = tokio::select! { () = churn => unreachable!(), took = work => took };
    assert!(took < Duration::from_millis(1_500), "{took:?}");
}

#[tokio::test]
async fn a_file_with_a_bad_document_keeps_what_it_named_when_it_was_good() {
    let root = folder();
    let file = root.path().join("a.yaml");
    put(&file, &["a", "b"]);
    let mut told = Told::of(root.path()).await;

    fs::write(&file, manifest(&["b", "c"]) + "---\nkind: [\n").unwrap();
    told.expect(&["a", "b", "c"]).await;
    assert_eq!((told.faults(), told.settled), (1, true));
    // What it named meanwhile was never good.
    fs::write(&file, manifest(&["d"]) + "---\nkind: [\n---\nkind: ]\n").unwrap();
    told.expect(&["a", "b", "d"]).await;
    assert_eq!((told.faults(), told.settled), (2, true));
    // Nor does renaming it, or a folder above it, change what is known.
    fs::rename(&file, root.path().join("b.yaml")).unwrap();
    told.expect_silence().await;
    fs::create_dir(root.path().join("x")).unwrap();
    fs::rename(root.path().join("b.yaml"), root.path().join("x/b.yaml")).unwrap();
    told.expect_silence().await;
    fs::rename(root.path().join("x"), root.path().join("y")).unwrap();
    told.expect_silence().await;
    assert_eq!((told.faults(), told.settled), (2, true));

    put(root.path().join("y/b.yaml"), &["d"]);
    told.expect(&["d"]).await;
    assert_eq!((told.faults(), told.settled), (0, true));
}

#[tokio::test]
async fn nothing_is_settled_while_a_file_has_never_been_good() {
    let root = folder();
    fs::write(root.path().join("bad.yaml"), manifest(&["a"]) + "---\nkind: [\n").unwrap();
    fs::write(root.path().join("worse.yaml"), "]").unwrap();
    let mut told = Told::of(root.path()).await;
    told.expect(&["a"]).await;
    assert_eq!((told.faults(), told.settled), (2, false));

    put(root.path().join("bad.yaml"), &["a"]);
    fs::write(root.path().join("worse.yaml"), "}").unwrap();
    told.expect_silence().await;
    assert_eq!((told.faults(), told.settled), (1, false));
    // It is told when that is over, although no account changes.
    fs::remove_file(root.path().join("worse.yaml")).unwrap();
    assert!(told.next(Duration::from_secs(2)).await);
    assert_eq!((told.faults(), told.settled), (0, true));
    assert_eq!(told.accounts.len(), 1);
}

#[tokio::test]
async fn the_excluded_folders_and_those_that_lead_into_them_are_passed_over() {
    let root = folder();
    let at = root.path();
    let (data, secrets) = (at.join("data"), at.join("out/secrets"));
    fs::create_dir_all(&data).unwrap();
    put(data.join("x.yaml"), &["x"]);
    put(at.join("a.yaml"), &["a"]);
    symlink("data", at.join("link")).unwrap();
    symlink("data/x.yaml", at.join("x.yaml")).unwrap();
    let source = FolderSource::open(at, &[data, secrets.clone()]).unwrap();
    let mut told = Told::of_source(source).await;
    told.expect(&["a"]).await;
    // It may come later, as Mica's own does.
    fs::create_dir_all(secrets.join("deep")).unwrap();
    put(secrets.join("deep/y.yaml"), &["y"]);
    symlink("out/secrets/deep", at.join("deep")).unwrap();
    put(at.join("out/b.yaml"), &["b"]);
    told.expect(&["a", "b"]).await;
    told.expect_silence().await;
    assert!(told.settled);
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_through_its_swaps() {
    let root = folder();
    let at = root.path().join("mount");
    let publish = |version: &str, files: &[(&str, &[&str])]| {
        fs::create_dir_all(at.join(version)).unwrap();
        for (name, accounts) in files {
            put(at.join(version).join(name), accounts);
        }
        symlink(version, at.join("..data_tmp")).unwrap();
        let before = fs::read_link(at.join("..data")).ok();
        fs::rename(at.join("..data_tmp"), at.join("..data")).unwrap();
        for (name, _) in files {
            let _ = symlink(format!("..data/{name}"), at.join(name));
        }
        if let Some(before) = before {
            fs::remove_dir_all(at.join(before)).unwrap();
        }
    };
    publish("..2026_01", &[("a.yaml", &["a"]), ("b.yaml", &["b"])]);
    let mut told = Told::of(root.path()).await;
    told.expect(&["a", "b"]).await;
    publish("..2026_02", &[("a.yaml", &["a", "new"]), ("b.yaml", &["b"])]);
    told.expect(&["a", "b", "new"]).await;
    publish("..2026_03", &[("a.yaml", &["a"]), ("b.yaml", &["b"]), ("c.yaml", &["c"])]);
    told.expect(&["a", "b", "c"]).await;
    assert_eq!((told.faults(), told.settled), (0, true));
    // One of the keys is deleted: the kubelet deletes its link.
    publish("..2026_04", &[("a.yaml", &["a"]), ("c.yaml", &["c2"])]);
    fs::remove_file(at.join("b.yaml")).unwrap();
    told.expect(&["a", "c2"]).await;
    told.expect_silence().await;
    assert_eq!(told.faults(), 0);
}

#[tokio::test]
async fn links_lead_to_files_and_folders_elsewhere_which_are_watched_too() {
    let (root, outside) = (folder(), folder());
    let (at, out) = (root.path(), outside.path());
    fs::create_dir_all(out.join("v1/sub")).unwrap();
    put(out.join("v1/sub/a.yaml"), &["a"]);
    put(out.join("b.off"), &["b"]);
    symlink("v1", out.join("current")).unwrap();
    symlink(out.join("current"), at.join("team")).unwrap();
    symlink(out.join("b.off"), at.join("b.yaml")).unwrap();
    let mut told = Told::of(at).await;
    told.expect(&["a", "b"]).await;

    put(out.join("b.off"), &["b2"]);
    told.expect(&["a", "b2"]).await;
    put(out.join("b.new"), &["b3"]);
    fs::rename(out.join("b.new"), out.join("b.off")).unwrap();
    told.expect(&["a", "b3"]).await;
    put(out.join("v1/sub/more.yaml"), &["more"]);
    told.expect(&["a", "b3", "more"]).await;

    fs::create_dir_all(out.join("v2")).unwrap();
    put(out.join("v2/c.yaml"), &["c"]);
    symlink("v2", out.join("next")).unwrap();
    fs::rename(out.join("next"), out.join("current")).unwrap();
    told.expect(&["b3", "c"]).await;
    put(out.join("v2/d.yaml"), &["d"]);
    told.expect(&["b3", "c", "d"]).await;
    // What the link led to before is nobody's now.
    put(out.join("v1/sub/more.yaml"), &["more", "evenmore"]);
    told.expect_silence().await;
    fs::remove_file(at.join("team")).unwrap();
    told.expect(&["b3"]).await;
    assert_eq!(told.faults(), 0);
}

#[tokio::test]
async fn a_link_that_leads_nowhere_removes_nothing_and_settles_nothing() {
    let (root, outside) = (folder(), folder());
    let (at, out) = (root.path(), outside.path());
    fs::create_dir(out.join("team")).unwrap();
    put(out.join("team/a.yaml"), &["a"]);
    put(out.join("b.yaml"), &["b"]);
    symlink(out.join("team"), at.join("team")).unwrap();
    symlink(out.join("b.yaml"), at.join("b.yaml")).unwrap();
    let mut told = Told::of(at).await;
    told.expect(&["a", "b"]).await;
    fs::rename(out.join("team"), out.join("away")).unwrap();
    fs::remove_file(out.join("b.yaml")).unwrap();
    told.expect_silence().await;
    assert_eq!((told.faults(), told.settled), (2, true));

    // One that starts like this does not know what it misses.
    let mut late = Told::of(at).await;
    assert_eq!((late.accounts.len(), late.faults(), late.settled), (0, 2, false));
    fs::rename(out.join("away"), out.join("team")).unwrap();
    put(out.join("b.yaml"), &["b2"]);
    late.expect(&["a", "b2"]).await;
    assert_eq!((late.faults(), late.settled), (0, true));
    told.expect(&["a", "b2"]).await;
    assert_eq!((told.faults(), told.settled), (0, true));
}

#[tokio::test]
async fn circles_of_links_end() {
    let root = folder();
    let at = root.path();
    fs::create_dir_all(at.join("x/y")).unwrap();
    put(at.join("x/y/a.yaml"), &["a"]);
    symlink("..", at.join("x/up")).unwrap();
    symlink("../..", at.join("x/y/root")).unwrap();
    symlink(".", at.join("x/self")).unwrap();
    symlink("y", at.join("x/same")).unwrap();
    symlink("loop.yaml", at.join("loop.yaml")).unwrap();
    symlink("pong.yaml", at.join("ping.yaml")).unwrap();
    symlink("ping.yaml", at.join("pong.yaml")).unwrap();
    let mut told = Told::of(at).await;
    told.expect(&["a"]).await;
    assert_eq!((told.faults(), told.settled), (3, false));
    // The one way to a folder goes, another remains.
    fs::rename(at.join("x/y"), at.join("x/.y")).unwrap();
    fs::remove_file(at.join("x/same")).unwrap();
    symlink(".y", at.join("x/same")).unwrap();
    for name in ["loop.yaml", "ping.yaml", "pong.yaml"] {
        fs::remove_file(at.join(name)).unwrap();
    }
    told.next(Duration::from_secs(2)).await;
    told.expect_silence().await;
    assert_eq!((told.accounts.len(), told.faults(), told.settled), (1, 0, true));
    put(at.join("x/.y/b.yaml"), &["b"]);
    told.expect(&["a", "b"]).await;
    fs::remove_file(at.join("x/same")).unwrap();
    told.expect(&[]).await;
}

#[tokio::test]
async fn what_is_no_file_is_never_opened_and_what_is_too_large_never_read() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let root = folder();
    let at = root.path();
    mknodat(CWD, at.join("fifo.yaml"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    symlink("fifo.yaml", at.join("to-fifo.yaml")).unwrap();
    symlink("/dev/zero", at.join("zero.yaml")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at.join("socket.yaml")).unwrap();
    fs::File::create(at.join("huge.yaml")).unwrap().set_len(1 << 30).unwrap();
    fs::create_dir(at.join("folder.yaml")).unwrap();
    put(at.join("folder.yaml/a.yaml"), &["a"]);
    let mut told = Told::of(at).await;
    told.expect(&["a"]).await;
    assert_eq!((told.faults(), told.settled), (5, false));
    assert!(told.source.buffer.capacity() < 1 << 20);
    for name in ["fifo.yaml", "to-fifo.yaml", "zero.yaml", "socket.yaml"] {
        fs::remove_file(at.join(name)).unwrap();
    }
    put(at.join("huge.yaml"), &["small"]);
    told.expect(&["a", "small"]).await;
    assert_eq!((told.faults(), told.settled), (0, true));
}

/// Runs as a user who may not read everything, for root may.
fn unprivileged(test: impl AsyncFnOnce() + Send + 'static) {
    std::thread::spawn(|| {
        if rustix::process::geteuid().is_root() {
            let nobody = rustix::process::Uid::from_raw(65_534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    })
    .join()
    .unwrap();
}

#[test]
fn what_may_not_be_read_keeps_what_it_named_until_it_may() {
    let close = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    unprivileged(async move || {
        let root = folder();
        let (file, dir) = (root.path().join("a.yaml"), root.path().join("dir"));
        fs::create_dir(&dir).unwrap();
        put(&file, &["a"]);
        put(dir.join("b.yaml"), &["b"]);
        let mut told = Told::of(root.path()).await;
        told.expect(&["a", "b"]).await;
        close(&file);
        close(&dir);
        told.expect_silence().await;
        assert_eq!((told.faults(), told.settled), (2, true));

        let mut late = Told::of(root.path()).await;
        assert_eq!((late.accounts.len(), late.faults(), late.settled), (0, 2, false));
        open(&dir);
        late.expect(&["b"]).await;
        assert_eq!((late.faults(), late.settled), (1, false));
        put(dir.join("b.yaml"), &["b", "c"]);
        late.expect(&["b", "c"]).await;
        open(&file);
        late.expect(&["a", "b", "c"]).await;
        assert_eq!((late.faults(), late.settled), (0, true));
        told.expect(&["a", "b", "c"]).await;
        assert_eq!((told.faults(), told.settled), (0, true));

        close(root.path());
        put_is_refused(&file);
        told.expect_silence().await;
        assert_eq!(told.faults(), 1);
        open(root.path());
        fs::remove_file(&file).unwrap();
        told.expect_silence_or(&["b", "c"]).await;
        assert_eq!(told.faults(), 0);
    });
}

fn put_is_refused(path: &Path) {
    assert!(fs::write(path, "").is_err());
}

impl Told {
    /// A folder that comes back is looked at within a tick, and what is gone then is held as always.
    async fn expect_silence_or(&mut self, names: &[&str]) {
        let wanted: BTreeSet<String> = names.iter().map(|name| format!("default/{name}")).collect();
        let end = Instant::now() + Duration::from_secs(4);
        while self.accounts != wanted {
            let left = end.saturating_duration_since(Instant::now());
            assert!(self.next(left).await, "{:?} are told, not {names:?}", self.accounts);
        }
    }
}

#[tokio::test]
async fn a_folder_that_goes_takes_nothing_with_it() {
    let parent = folder();
    let at = parent.path().join("root");
    fs::create_dir_all(at.join("sub")).unwrap();
    put(at.join("a.yaml"), &["a"]);
    put(at.join("sub/b.yaml"), &["b"]);
    put(at.join("sub/bad.yaml"), &["c"]);
    let mut told = Told::of(&at).await;
    fs::write(at.join("sub/bad.yaml"), "]").unwrap();
    told.expect_silence().await;
    assert_eq!(told.faults(), 1);

    // Moved away and back.
    fs::rename(&at, parent.path().join("away")).unwrap();
    told.expect_silence().await;
    assert_eq!(told.faults(), 2);
    put(parent.path().join("away/new.yaml"), &["new"]);
    told.expect_silence().await;
    fs::rename(parent.path().join("away"), &at).unwrap();
    told.expect(&["a", "b", "c", "new"]).await;
    assert_eq!(told.faults(), 1);
    put(at.join("sub/d.yaml"), &["d"]);
    told.expect(&["a", "b", "c", "d", "new"]).await;

    // Deleted and made anew, by and by; the file that was bad is bad in the new one too.
    fs::remove_dir_all(&at).unwrap();
    told.expect_silence().await;
    fs::create_dir_all(at.join("sub")).unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    fs::write(at.join("sub/bad.yaml"), "}").unwrap();
    put(at.join("a.yaml"), &["a"]);
    told.expect_silence_or(&["a", "c"]).await;
    assert_eq!((told.faults(), told.settled), (1, true));

    // Swapped for another in one step.
    let other = parent.path().join("other");
    fs::create_dir_all(other.join("sub")).unwrap();
    put(other.join("sub/e.yaml"), &["a", "e"]);
    rustix::fs::renameat_with(
        rustix::fs::CWD,
        &other,
        rustix::fs::CWD,
        &at,
        rustix::fs::RenameFlags::EXCHANGE,
    )
    .unwrap();
    told.expect_silence_or(&["a", "e"]).await;
    put(at.join("sub/f.yaml"), &["f"]);
    told.expect(&["a", "e", "f"]).await;

    // Something else in its place.
    fs::remove_dir_all(&at).unwrap();
    fs::write(&at, "").unwrap();
    told.expect_silence().await;
    assert_eq!(told.faults(), 1);
}

#[tokio::test]
async fn without_watches_a_sweep_finds_the_same() {
    let root = folder();
    let at = root.path();
    for i in 0..20 {
        fs::create_dir(at.join(format!("{i}"))).unwrap();
        put(at.join(format!("{i}/a.yaml")), &[&format!("a{i}")]);
    }
    symlink("0", at.join("link")).unwrap();
    for watches in [0, 7] {
        let mut source = FolderSource::open(at, &[]).unwrap();
        source.watches_left = watches;
        let mut told = Told::of_source(source).await;
        assert_eq!(told.accounts.len(), 20, "{:?}", told.accounts);
        put(at.join("19/a.yaml"), &["changed"]);
        put(at.join("18/b.yaml"), &["new"]);
        fs::remove_file(at.join("17/a.yaml")).unwrap();
        fs::remove_dir_all(at.join("16")).unwrap();
        fs::create_dir(at.join("20")).unwrap();
        put(at.join("20/a.yaml"), &["a20"]);
        fs::remove_file(at.join("link")).unwrap();
        symlink("/nowhere", at.join("link")).unwrap();
        let late = Told::of(at).await;
        told.expect_by_and_by(&late.accounts, 1).await;
        assert_eq!(told.accounts.len(), 20);
        assert_eq!((told.faults(), late.faults()), (1, 1));

        put(at.join("19/a.yaml"), &["a19"]);
        fs::remove_file(at.join("18/b.yaml")).unwrap();
        put(at.join("17/a.yaml"), &["a17"]);
        fs::create_dir(at.join("16")).unwrap();
        put(at.join("16/a.yaml"), &["a16"]);
        fs::remove_dir_all(at.join("20")).unwrap();
        fs::remove_file(at.join("link")).unwrap();
        symlink("0", at.join("link")).unwrap();
        told.expect_by_and_by(&(0..20).map(|i| format!("default/a{i}")).collect(), 0).await;
    }
}

#[tokio::test]
async fn lost_events_are_made_up_for() {
    let root = folder();
    put(root.path().join("a.yaml"), &["a"]);
    let mut told = Told::of(root.path()).await;
    put(root.path().join("b.yaml"), &["b"]);
    fs::remove_file(root.path().join("a.yaml")).unwrap();
    // As if the kernel had kept none of it.
    let _ = told.source.watcher.as_mut().unwrap().next().await;
    told.source.note(vec![Event::Overflow]);
    told.expect(&["b"]).await;
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn take(&self) -> Vec<String> {
        let bytes = std::mem::take(&mut *self.0.lock().unwrap());
        String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
    }
}

#[tokio::test]
async fn each_fault_is_logged_when_it_appears_or_changes_and_when_it_is_mended() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
    // With one subscriber alone, tracing asks whichever thread comes to a line first whether anybody wants it, and
    // that may be another test's.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    let _guard = tracing::subscriber::set_default(subscriber);
    let root = folder();
    let file = root.path().join("a.yaml");
    put(&file, &["a"]);
    let mut told = Told::of(root.path()).await;
    assert_eq!(log.take(), [""; 0]);

    fs::write(&file, manifest(&["a"]) + "---\nkind: [\n").unwrap();
    told.expect_silence().await;
    let lines = log.take();
    assert_eq!(lines.len(), 1, "{lines:?}");
    for part in ["WARN", "a.yaml", "document=2", "line "] {
        assert!(lines[0].contains(part), "{lines:?}");
    }
    // Another joins it, which is told alone; then the same again.
    fs::write(&file, manifest(&["a"]) + "---\nkind: [\n---\nkind: }\n").unwrap();
    told.expect_silence().await;
    let lines = log.take();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("document=3"), "{lines:?}");
    fs::write(&file, manifest(&["a"]) + "---\nkind: [\n---\nkind: }\n").unwrap();
    told.expect_silence().await;
    assert_eq!(log.take(), [""; 0]);
    put(&file, &["a"]);
    told.expect_silence().await;
    let lines = log.take();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("INFO") && lines[0].contains("a.yaml"), "{lines:?}");

    fs::write(&file, "[\n---\n".repeat(1_000)).unwrap();
    told.expect_silence().await;
    let lines = log.take();
    assert_eq!(lines.len(), MAX_LOGGED + 1);
}

/// What people and programs do to folders, on a few names so that it collides.
fn disturb(at: &Path, outside: &Path, random: &mut impl FnMut(usize) -> usize) {
    let dirs = ["", "p", "q", "p/r", "q/s", "p/r/t"];
    let names = ["1.yaml", "2.yml", "3.json", "4", "link", "link.yaml"];
    let place = |random: &mut dyn FnMut(usize) -> usize| {
        let base = if random(5) == 0 { outside } else { at };
        base.join(dirs[random(dirs.len())])
    };
    let dir = place(random);
    let file = dir.join(names[random(names.len())]);
    let account = format!("a{}", random(30));
    let accounts: Vec<&str> = [account.as_str(), "common"][..1 + random(2)].to_vec();
    // Most of it is impossible at times, as it is for others.
    let _ = match random(12) {
        0 | 1 => fs::create_dir_all(&dir),
        2..=4 => fs::write(&file, manifest(&accounts)),
        5 => {
            let new = dir.join(".new");
            fs::write(&new, manifest(&accounts)).and_then(|()| fs::rename(&new, &file))
        }
        6 => fs::remove_file(&file),
        7 if dir != at && dir != outside => fs::remove_dir_all(&dir),
        8 if dir != at && dir != outside => fs::rename(&dir, place(random)),
        9 => fs::rename(&file, place(random).join(names[random(names.len())])),
        10 => symlink(place(random), dir.join(names[random(names.len())])),
        11 => {
            let target = place(random).join(names[random(3)]);
            let link = dir.join(names[random(names.len())]);
            let new = dir.join(".newlink");
            symlink(target, &new).and_then(|()| fs::rename(&new, link))
        }
        _ => Ok(()),
    };
}

/// Links that lead nowhere keep what they led to, which a source that starts later cannot know.
fn remove_dangling(at: &Path) {
    for entry in fs::read_dir(at).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() && !path.exists() {
            fs::remove_file(&path).unwrap();
        } else if path.is_dir() && !path.is_symlink() {
            remove_dangling(&path);
        }
    }
}

async fn churn_ends_as_a_fresh_look(seed: u64) {
    let (root, outside) = (folder(), folder());
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % below
    };
    for _ in 0..30 {
        disturb(root.path(), outside.path(), &mut random);
    }
    let mut told = Told::of(root.path()).await;
    for _ in 0..2 {
        for _ in 0..40 {
            disturb(root.path(), outside.path(), &mut random);
            if random(4) == 0 {
                let pause = Duration::from_millis(random(250) as u64);
                told.next(pause).await;
            }
        }
        told.rest().await;
        remove_dangling(root.path());
        remove_dangling(outside.path());
        told.rest().await;
        let fresh = Told::of(root.path()).await;
        assert_eq!(told.accounts, fresh.accounts, "seed {seed}");
        assert_eq!(told.faults(), fresh.faults(), "seed {seed}");
        assert_eq!(told.settled, fresh.settled, "seed {seed}");
        told.source.check();
    }
}

impl FolderSource {
    /// That nothing is kept which is not reachable, and everything known from both sides.
    fn check(&self) {
        let mut seen = HashSet::from([ROOT]);
        let (mut links, mut aliases) = (0, 0);
        for (id, dir) in self.dirs.iter().enumerate().filter_map(|(id, dir)| Some((id as u32, dir.as_ref()?)))
        {
            assert!(dir.entries.is_sorted_by(|a, b| a.name < b.name));
            assert_eq!(self.by_identity.get(&dir.identity), Some(&id));
            links += dir.aliases.len();
            for entry in &dir.entries {
                match entry.node {
                    Node::Dir(to) => {
                        assert!(seen.insert(to));
                        assert_eq!(self.dir(to).map(|dir| (dir.parent, &dir.name)), Some((id, &entry.name)));
                    }
                    Node::Alias(to) => {
                        aliases += 1;
                        assert!(self.dir(to).unwrap().aliases.contains(&(id, entry.name.clone())));
                    }
                    Node::Nothing => assert!(entry.link),
                    Node::File(_) => {}
                }
            }
            for (lookout, _) in &dir.steps {
                assert!(self.lookouts[*lookout as usize].users.contains(&id));
            }
        }
        assert_eq!(links, aliases);
        assert_eq!(seen.len(), self.dirs.iter().flatten().count());
        assert_eq!(seen.len(), self.by_identity.len());
        let used = self.lookouts.iter().filter(|lookout| !lookout.users.is_empty()).count();
        assert_eq!(used, self.lookout_at.len());
        assert!(self.queue.is_empty() && self.scan.is_none());
    }
}

#[test]
fn any_churn_of_good_files_ends_as_a_fresh_look_sees_it() {
    let threads: Vec<_> = (0..4)
        .map(|thread| {
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let tasks = tokio::task::LocalSet::new();
                let runs: Vec<_> = (0..15)
                    .map(|run| tasks.spawn_local(churn_ends_as_a_fresh_look(thread * 15 + run)))
                    .collect();
                runtime.block_on(tasks.run_until(async {
                    for run in runs {
                        run.await.unwrap();
                    }
                }));
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[tokio::test]
async fn the_bookinfo_example_has_one_account_for_each_service() {
    let mut told = Told::of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/bookinfo")).await;
    let names = ["details", "productpage", "ratings", "reviews-v1", "reviews-v2", "reviews-v3"];
    assert_eq!(told.accounts, names.map(|name| format!("bookinfo/{name}")).into());
    assert_eq!((told.faults(), told.settled), (0, true));
    told.expect_silence().await;
}
