use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::Duration;

use zeroize::Zeroizing;

use super::*;
use crate::sink::FoundSet;
use crate::sys::dir::fault;

const PRIVATE: Access = Access::mode(0o600);

struct House {
    folder: tempfile::TempDir,
}

impl House {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("data")).unwrap();
        Self { folder }
    }

    fn secrets(&self) -> PathBuf {
        self.folder.path().join("data/secrets")
    }

    fn open_with(&self, secrets: &Path, access: Access) -> Result<FolderSink, Error> {
        let data = Dir::open_trusted(&self.folder.path().join("data"), None).unwrap();
        FolderSink::open(&data, secrets, access)
    }

    fn open(&self) -> FolderSink {
        self.open_with(&self.secrets(), PRIVATE).unwrap()
    }

    fn of(&self, account: &ServiceAccount) -> PathBuf {
        self.secrets().join(account.namespace()).join(folder_name(account))
    }

    fn recorded(&self) -> String {
        fs::read_to_string(self.folder.path().join("data").join(record::NAME)).unwrap()
    }
}

fn account(text: &str) -> ServiceAccount {
    let (namespace, name) = text.split_once('/').unwrap();
    ServiceAccount::new(namespace, name).unwrap()
}

fn web() -> ServiceAccount {
    account("default/web")
}

fn set(number: u32) -> CertificateSet {
    CertificateSet {
        chain_pem: format!("chain {number}\n"),
        key_pem: Zeroizing::new(format!("key {number}\n")),
        roots_pem: format!("roots {number}\n").into(),
    }
}

/// What a consumer reads, file by file through the links.
fn delivered(folder: &Path) -> Option<[String; 3]> {
    let read = |name| fs::read_to_string(folder.join(name)).ok();
    Some([read("cert-chain.pem")?, read("key.pem")?, read("root-cert.pem")?])
}

fn files_of(set: &CertificateSet) -> [String; 3] {
    [set.chain_pem.clone(), set.key_pem.to_string(), set.roots_pem.to_string()]
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// All there is below a folder, links not followed.
fn tree(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stat = fs::symlink_metadata(&path).unwrap();
        let content = if stat.is_dir() {
            found.extend(tree(&path));
            "folder".to_owned()
        } else if stat.is_symlink() {
            format!("-> {:?}", fs::read_link(&path).unwrap())
        } else if stat.is_file() {
            fs::read_to_string(&path).unwrap()
        } else {
            "other".to_owned()
        };
        found.insert(path, format!("{content} {:o} {}", stat.mode(), stat.uid()));
    }
    found
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn found(sink: &FolderSink, account: &ServiceAccount) -> Found {
    sink.read_now(account).unwrap()
}

#[track_caller]
fn assert_whole(sink: &FolderSink, account: &ServiceAccount, expected: &CertificateSet) {
    match found(sink, account) {
        Found::Set(FoundSet { set, loose: None, marked: true }) if set == *expected => {}
        other => panic!("{other:?}"),
    }
}

fn damage(sink: &FolderSink, account: &ServiceAccount) -> String {
    match found(sink, account) {
        Found::Damaged(what) => what,
        other => panic!("{other:?}"),
    }
}

fn loose(sink: &FolderSink, account: &ServiceAccount) -> String {
    match found(sink, account) {
        Found::Set(FoundSet { loose: Some(loose), .. }) => loose,
        other => panic!("{other:?}"),
    }
}

fn foreign(sink: &FolderSink, account: &ServiceAccount) -> String {
    match found(sink, account) {
        Found::Foreign(why) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_set_is_delivered_as_the_kubelet_would() {
    let house = House::new();
    let sink = house.open();
    assert_eq!(found(&sink, &web()), Found::Absent);
    sink.publish_now(&web(), &set(1)).unwrap();
    let folder = house.of(&web());
    assert_eq!(sink.path_of(&web()), folder);
    assert_eq!(delivered(&folder), Some(files_of(&set(1))));
    let current = fs::read_link(folder.join("..data")).unwrap();
    let current = current.into_os_string().into_string().unwrap();
    assert!(volume::is_stamped(&current), "{current}");
    assert_eq!(names(&folder), [current.as_str(), "..data", "cert-chain.pem", "key.pem", "root-cert.pem"]);
    for (link, target) in [
        ("key.pem", "..data/key.pem"),
        ("cert-chain.pem", "..data/cert-chain.pem"),
        ("root-cert.pem", "..data/root-cert.pem"),
    ] {
        assert_eq!(fs::read_link(folder.join(link)).unwrap(), Path::new(target));
    }
    for (path, mode_of_it) in [
        ("..", 0o700),
        (".", 0o700),
        ("..data/.", 0o700),
        ("..data/key.pem", 0o600),
        ("..data/cert-chain.pem", 0o600),
        ("..data/root-cert.pem", 0o600),
    ] {
        assert_eq!(mode(&folder.join(path)), mode_of_it, "{path}");
    }
    assert_whole(&sink, &web(), &set(1));
    assert_eq!(sink.recorded(), [web()]);
}

#[test]
fn whoever_opens_the_data_link_once_sees_one_whole_set() {
    let house = House::new();
    let sink = house.open();
    sink.publish_now(&web(), &set(0)).unwrap();
    let data = house.of(&web()).join("..data");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = std::collections::HashSet::new();
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                // As a reader that resolves the link once and then takes its time.
                let once = data.parent().unwrap().join(fs::read_link(&data).unwrap());
                let Some([chain, key, roots]) = delivered(&once) else {
                    // Gone only after two more publications, which a reader is free to miss here.
                    continue;
                };
                let number = |text: &str| text.split(' ').nth(1).unwrap().to_owned();
                assert_eq!(number(&chain), number(&key));
                assert_eq!(number(&chain), number(&roots));
                seen.insert(number(&key));
            }
            seen.len()
        });
        for number in 1..500 {
            sink.publish_now(&web(), &set(number)).unwrap();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(reader.join().unwrap() > 1);
    });
    // The set before is kept for readers that are not done; no more than that.
    assert_eq!(names(&house.of(&web())).len(), 4 + 2);
}

#[test]
fn the_set_before_outlives_its_replacement() {
    let house = House::new();
    let sink = house.open();
    sink.publish_now(&web(), &set(1)).unwrap();
    let folder = house.of(&web());
    let opened = Dir::open_trusted(&folder.join("..data"), None).unwrap();
    sink.publish_now(&web(), &set(2)).unwrap();
    assert_eq!(opened.read("key.pem", 99).unwrap().0, b"key 1\n");
    assert_eq!(delivered(&folder), Some(files_of(&set(2))));
    assert_whole(&sink, &web(), &set(2));
}

#[test]
fn a_removed_account_leaves_nothing() {
    let house = House::new();
    let sink = house.open();
    let (api, other) = (account("default/api"), account("other/web"));
    for account in [&web(), &api, &other] {
        sink.publish_now(account, &set(1)).unwrap();
        sink.publish_now(account, &set(2)).unwrap();
    }
    sink.remove_now(&web()).unwrap();
    assert!(!house.of(&web()).exists());
    assert_eq!(found(&sink, &web()), Found::Absent);
    assert_eq!(names(&house.secrets().join("default")), ["istio.api"]);
    sink.remove_now(&other).unwrap();
    sink.remove_now(&other).unwrap();
    assert_eq!(names(&house.secrets()), [".mica.lock", "default"]);
    assert_eq!(sink.recorded().as_slice(), std::slice::from_ref(&api));
    drop(sink);
    let sink = house.open();
    assert_eq!(sink.recorded(), [api]);
    sink.publish_now(&other, &set(3)).unwrap();
    assert_whole(&sink, &other, &set(3));
}

#[test]
fn a_restart_finds_what_was_delivered() {
    let house = House::new();
    let sink = house.open();
    sink.announce_now(&[web(), account("a/b")]).unwrap();
    sink.publish_now(&web(), &set(1)).unwrap();
    drop(sink);
    let before = tree(&house.secrets());
    let sink = house.open();
    // Announced, and killed before it was made: whoever makes that folder keeps it.
    assert_eq!(sink.recorded(), [web()]);
    assert!(!house.recorded().contains("a/b"));
    assert_whole(&sink, &web(), &set(1));
    assert!(sink.unchanged(&web()));
    assert_eq!(tree(&house.secrets()), before);
}

#[test]
fn a_namespace_folder_that_we_did_not_make_stays() {
    let house = House::new();
    fs::create_dir_all(house.secrets().join("default")).unwrap();
    chmod(&house.secrets().join("default"), 0o755);
    let sink = house.open();
    sink.publish_now(&web(), &set(1)).unwrap();
    assert_eq!(mode(&house.secrets().join("default")), 0o755);
    assert_whole(&sink, &web(), &set(1));
    sink.remove_now(&web()).unwrap();
    assert!(names(&house.secrets().join("default")).is_empty());
}

#[test]
fn a_folder_that_others_made_is_never_touched() {
    let house = House::new();
    let folder = house.of(&web());
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("key.pem"), "theirs").unwrap();
    let sink = house.open();
    let before = tree(&house.secrets());
    let why = foreign(&sink, &web());
    assert!(why.contains(&folder.display().to_string()) && why.contains("did not make"), "{why}");
    let error = sink.publish_now(&web(), &set(1)).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    sink.announce_now(&[web()]).unwrap();
    sink.publish_now(&web(), &set(1)).unwrap_err();
    sink.remove_now(&web()).unwrap();
    assert_eq!(tree(&house.secrets()), before);
    assert!(sink.recorded().is_empty());
    // Moved out of the way, it is delivered.
    fs::rename(&folder, house.secrets().join("default/mine")).unwrap();
    assert_eq!(found(&sink, &web()), Found::Absent);
    sink.publish_now(&web(), &set(1)).unwrap();
    assert_whole(&sink, &web(), &set(1));
}

#[test]
fn a_folder_that_others_make_before_us_is_theirs() {
    let house = House::new();
    let sink = house.open();
    let (removed, moved) = (account("default/removed"), account("default/moved"));
    sink.announce_now(&[web()]).unwrap();
    for account in [&removed, &moved] {
        sink.publish_now(account, &set(1)).unwrap();
    }
    fs::remove_dir_all(house.of(&removed)).unwrap();
    assert_eq!(found(&sink, &removed), Found::Absent);
    for account in [&web(), &removed] {
        fs::create_dir_all(house.of(account)).unwrap();
        fs::write(house.of(account).join("key.pem"), "theirs").unwrap();
        let error = sink.publish_now(account, &set(1)).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error}");
        sink.remove_now(account).unwrap();
        assert_eq!(fs::read_to_string(house.of(account).join("key.pem")).unwrap(), "theirs");
        assert!(!sink.recorded().contains(account));
    }
    // The whole namespace is another one.
    fs::rename(house.secrets().join("default"), house.secrets().join("old")).unwrap();
    assert_eq!(found(&sink, &moved), Found::Absent);
    fs::create_dir(house.secrets().join("default")).unwrap();
    chmod(&house.secrets().join("default"), 0o755);
    sink.publish_now(&moved, &set(2)).unwrap();
    sink.remove_now(&moved).unwrap();
    assert_eq!(mode(&house.secrets().join("default")), 0o755);
}

#[test]
fn files_of_others_in_our_folder_stay() {
    let house = House::new();
    let sink = house.open();
    sink.publish_now(&web(), &set(1)).unwrap();
    let folder = house.of(&web());
    fs::write(folder.join("notes.txt"), "mine").unwrap();
    fs::write(folder.join("..data/more.txt"), "also mine").unwrap();
    sink.publish_now(&web(), &set(2)).unwrap();
    sink.publish_now(&web(), &set(3)).unwrap();
    assert_whole(&sink, &web(), &set(3));
    sink.remove_now(&web()).unwrap();
    let kept = names(&folder);
    assert_eq!(kept.len(), 2, "{kept:?}");
    assert_eq!(kept[1], "notes.txt");
    assert_eq!(names(&folder.join(&kept[0])), ["more.txt"]);
    assert!(sink.recorded().is_empty());
    assert_eq!(found(&sink, &web()), Found::Absent);
    drop(sink);
    let sink = house.open();
    assert_eq!(found(&sink, &web()), Found::Absent);
    // Still ours to deliver into when the account comes back.
    sink.publish_now(&web(), &set(4)).unwrap();
    assert_whole(&sink, &web(), &set(4));
    assert_eq!(fs::read_to_string(folder.join("notes.txt")).unwrap(), "mine");
    fs::remove_file(folder.join("notes.txt")).unwrap();
    fs::remove_file(folder.join(&kept[0]).join("more.txt")).unwrap();
    sink.remove_now(&web()).unwrap();
    assert_eq!(names(&house.secrets()), [".mica.lock"]);
}

/// Plants something in a delivered folder; gets that folder, and a folder elsewhere to lure us to.
type Plant = fn(&Path, &Path);

const PLANTED: &[(&str, Plant)] = &[
    ("folder is a link elsewhere", |folder, lure| {
        fs::remove_dir_all(folder).unwrap();
        symlink(lure, folder).unwrap();
    }),
    ("folder is a file", |folder, _| {
        fs::remove_dir_all(folder).unwrap();
        fs::write(folder, "x").unwrap();
    }),
    ("data link leads out by its full path", |folder, lure| {
        fs::remove_file(folder.join("..data")).unwrap();
        symlink(lure, folder.join("..data")).unwrap();
    }),
    ("data link leads out by dots", |folder, _| {
        fs::remove_file(folder.join("..data")).unwrap();
        symlink("../../../../lure", folder.join("..data")).unwrap();
    }),
    ("data link is a loop", |folder, _| {
        fs::remove_file(folder.join("..data")).unwrap();
        symlink("..data", folder.join("..data")).unwrap();
    }),
    ("data link dangles", |folder, _| {
        fs::remove_file(folder.join("..data")).unwrap();
        symlink("..2020_01_01_00_00_00.1", folder.join("..data")).unwrap();
    }),
    ("data link leads through another link", |folder, lure| {
        let between = "..2020_01_01_00_00_00.1";
        symlink(lure, folder.join(between)).unwrap();
        fs::remove_file(folder.join("..data")).unwrap();
        symlink(between, folder.join("..data")).unwrap();
    }),
    ("data link is missing", |folder, _| {
        fs::remove_file(folder.join("..data")).unwrap();
    }),
    ("data link is a file", |folder, _| {
        fs::remove_file(folder.join("..data")).unwrap();
        fs::write(folder.join("..data"), "x").unwrap();
    }),
    ("data link is an empty folder", |folder, _| {
        fs::remove_file(folder.join("..data")).unwrap();
        fs::create_dir(folder.join("..data")).unwrap();
    }),
    ("next data link is in the way", |folder, lure| {
        symlink(lure, folder.join("..data_tmp")).unwrap();
        fs::remove_file(folder.join("key.pem")).unwrap();
    }),
    ("current set is missing", |folder, _| {
        let current = fs::canonicalize(folder.join("..data")).unwrap();
        fs::remove_dir_all(current).unwrap();
    }),
    ("key link is a file", |folder, _| {
        fs::remove_file(folder.join("key.pem")).unwrap();
        fs::write(folder.join("key.pem"), "x").unwrap();
    }),
    ("key link leads elsewhere", |folder, lure| {
        fs::remove_file(folder.join("key.pem")).unwrap();
        symlink(lure.join("key.pem"), folder.join("key.pem")).unwrap();
    }),
    ("key link is a FIFO", |folder, _| {
        fs::remove_file(folder.join("key.pem")).unwrap();
        fifo(folder, "key.pem");
    }),
    ("key link is an empty folder", |folder, _| {
        fs::remove_file(folder.join("key.pem")).unwrap();
        fs::create_dir(folder.join("key.pem")).unwrap();
    }),
    ("key link is missing", |folder, _| {
        fs::remove_file(folder.join("key.pem")).unwrap();
    }),
    ("key is missing", |folder, _| {
        fs::remove_file(folder.join("..data/key.pem")).unwrap();
    }),
    ("key is a link elsewhere", |folder, lure| {
        fs::remove_file(folder.join("..data/key.pem")).unwrap();
        symlink(lure.join("key.pem"), folder.join("..data/key.pem")).unwrap();
    }),
    ("key is a FIFO", |folder, _| {
        fs::remove_file(folder.join("..data/key.pem")).unwrap();
        fifo(&folder.join("..data/."), "key.pem");
    }),
    ("chain is a folder", |folder, _| {
        fs::remove_file(folder.join("..data/cert-chain.pem")).unwrap();
        fs::create_dir(folder.join("..data/cert-chain.pem")).unwrap();
    }),
    ("chain has a gigabyte", |folder, _| {
        let file = fs::File::create(folder.join("..data/cert-chain.pem")).unwrap();
        file.set_len(1 << 30).unwrap();
    }),
    ("roots are not text", |folder, _| {
        fs::write(folder.join("..data/root-cert.pem"), b"\xff\xfe").unwrap();
    }),
];

fn fifo(folder: &Path, name: &str) {
    let folder = fs::canonicalize(folder).unwrap();
    let folder = fs::File::open(folder).unwrap();
    rustix::fs::mknodat(&folder, name, rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o600), 0)
        .unwrap();
}

fn with_planted(check: impl Fn(&str, &House, &FolderSink, Plant)) {
    for (what, plant) in PLANTED {
        let house = House::new();
        let lure = house.folder.path().join("lure");
        fs::create_dir(&lure).unwrap();
        for name in ["cert-chain.pem", "key.pem", "root-cert.pem", "other"] {
            fs::write(lure.join(name), "theirs").unwrap();
        }
        let lured = tree(&lure);
        let sink = house.open();
        sink.publish_now(&web(), &set(1)).unwrap();
        check(what, &house, &sink, *plant);
        assert_eq!(tree(&lure), lured, "{what}: touched what is elsewhere");
    }
}

fn lure_of(house: &House) -> PathBuf {
    house.folder.path().join("lure")
}

#[test]
fn what_is_planted_is_told_and_repaired() {
    with_planted(|what, house, sink, plant| {
        plant(&house.of(&web()), &lure_of(house));
        assert!(!sink.unchanged(&web()), "{what}");
        let told = damage(sink, &web());
        assert!(told.contains(&house.of(&web()).display().to_string()), "{what}: {told}");
        assert!(sink.unchanged(&web()), "{what}: not the same any more by reading");
        sink.publish_now(&web(), &set(2)).unwrap();
        assert_whole(sink, &web(), &set(2));
        assert_eq!(delivered(&house.of(&web())), Some(files_of(&set(2))), "{what}");
    });
}

#[test]
fn what_is_planted_is_repaired_after_a_restart() {
    with_planted(|what, house, _, plant| {
        plant(&house.of(&web()), &lure_of(house));
        let elsewhere = house.folder.path().join("moved");
        // Another process: the lock of the first one goes with it.
        fs::rename(house.secrets().join(".mica.lock"), elsewhere).unwrap();
        let sink = house.open();
        damage(&sink, &web());
        sink.publish_now(&web(), &set(2)).unwrap();
        assert_whole(&sink, &web(), &set(2));
        assert_eq!(sink.recorded(), [web()], "{what}");
    });
}

#[test]
fn what_is_planted_does_not_mislead_a_removal() {
    with_planted(|what, house, sink, plant| {
        plant(&house.of(&web()), &lure_of(house));
        sink.remove_now(&web()).unwrap();
        assert!(sink.recorded().is_empty(), "{what}");
        let left = house.of(&web());
        if left.exists() {
            // What others put there, and nothing else.
            let left = names(&left);
            assert!(left.iter().all(|name| name.starts_with("..")), "{what}: {left:?}");
            assert!(house.recorded().contains("~default/web"), "{what}");
        }
    });
}

#[test]
fn a_folder_with_contents_in_the_place_of_a_link_is_told() {
    let house = House::new();
    let sink = house.open();
    for name in ["key.pem", "..data"] {
        sink.publish_now(&web(), &set(1)).unwrap();
        let path = house.of(&web()).join(name);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        fs::write(path.join("theirs"), "x").unwrap();
        damage(&sink, &web());
        let error = sink.publish_now(&web(), &set(2)).unwrap_err();
        assert!(matches!(error, Error::Obstructed { .. }), "{error}");
        fs::remove_file(path.join("theirs")).unwrap();
        sink.publish_now(&web(), &set(3)).unwrap();
        assert_whole(&sink, &web(), &set(3));
    }
}

#[test]
fn a_namespace_folder_that_is_no_folder_of_ours_is_foreign() {
    let house = House::new();
    let lure = house.folder.path().join("lure");
    fs::create_dir_all(lure.join("istio.web")).unwrap();
    let sink = house.open();
    sink.publish_now(&web(), &set(1)).unwrap();
    let namespace = house.secrets().join("default");
    fs::rename(&namespace, house.secrets().join("away")).unwrap();
    let plants: [(&str, &dyn Fn()); 3] = [
        ("a symbolic link", &|| symlink(&lure, &namespace).unwrap()),
        ("a file", &|| fs::write(&namespace, "x").unwrap()),
        ("a FIFO", &|| fifo(&house.secrets(), "default")),
    ];
    for (kind, plant) in plants {
        plant();
        let why = foreign(&sink, &web());
        assert!(why.contains(kind), "{why}");
        let error = sink.publish_now(&web(), &set(2)).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error}");
        let error = sink.remove_now(&web()).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error}");
        fs::remove_file(&namespace).unwrap();
    }
    assert!(names(&lure.join("istio.web")).is_empty());
    for bad in [0o777, 0o1777, 0o702] {
        fs::create_dir(&namespace).unwrap();
        chmod(&namespace, bad);
        let why = foreign(&sink, &web());
        assert!(why.contains("written to by"), "{why}");
        fs::remove_dir(&namespace).unwrap();
    }
}

#[test]
fn a_namespace_that_others_may_write_to_by_now_is_refused_until_that_is_mended() {
    let house = House::new();
    let sink = house.open();
    let namespace = house.secrets().join("default");
    fs::create_dir(&namespace).unwrap();
    chmod(&namespace, 0o755);
    sink.publish_now(&web(), &set(1)).unwrap();
    chmod(&namespace, 0o777);
    for _ in 0..3 {
        let error = sink.publish_now(&web(), &set(2)).unwrap_err();
        assert!(error.to_string().contains("may be written to by every user"), "{error}");
        assert!(foreign(&sink, &web()).contains("written to by"));
    }
    chmod(&namespace, 0o755);
    assert_whole(&sink, &web(), &set(1));
    sink.publish_now(&web(), &set(2)).unwrap();
    assert_whole(&sink, &web(), &set(2));
}

#[test]
fn loose_permissions_are_told_and_repaired() {
    let house = House::new();
    let sink = house.open();
    sink.publish_now(&web(), &set(1)).unwrap();
    let folder = house.of(&web());
    for path in ["", "..", "..data/.", "..data/key.pem", "..data/cert-chain.pem", "..data/root-cert.pem"] {
        let path = folder.join(path);
        let before = mode(&path);
        chmod(&path, 0o755);
        assert!(!sink.unchanged(&web()) || path.ends_with(".."), "{}", path.display());
        let told = loose(&sink, &web());
        assert!(told.contains("mode 0755"), "{told}");
        sink.publish_now(&web(), &set(1)).unwrap();
        assert_eq!(mode(&path), before);
        assert_whole(&sink, &web(), &set(1));
    }
}

#[test]
fn owner_group_and_mode_are_as_configured() {
    if !rustix::process::geteuid().is_root() {
        panic!("run the tests as root, in a container say: giving files to another user needs it");
    }
    let house = House::new();
    let secrets = house.folder.path().join("elsewhere");
    let open = || {
        let access = Access { mode: 0o640, owner: Some(12_345), group: Some(12_346) };
        house.open_with(&secrets, access)
    };
    let sink = open().unwrap();
    sink.publish_now(&web(), &set(1)).unwrap();
    let folder = secrets.join("default/istio.web");
    let key = fs::metadata(folder.join("key.pem")).unwrap();
    assert_eq!((key.uid(), key.gid(), key.mode() & 0o7777), (12_345, 12_346, 0o640));
    let stat = fs::metadata(&folder).unwrap();
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (12_345, 12_346, 0o750));
    let root = fs::metadata(&secrets).unwrap();
    assert_eq!((root.uid(), root.gid(), root.mode() & 0o7777), (0, 12_346, 0o751));
    assert_whole(&sink, &web(), &set(1));

    for path in [folder.clone(), folder.join("..data/key.pem")] {
        std::os::unix::fs::chown(&path, Some(4242), None).unwrap();
        let told = loose(&sink, &web());
        assert!(told.contains("owner 4242"), "{told}");
        sink.publish_now(&web(), &set(1)).unwrap();
        assert_whole(&sink, &web(), &set(1));
    }
    drop(sink);
    // What was configured differently is told, and brought in line.
    let sink = house.open_with(&secrets, PRIVATE).unwrap();
    loose(&sink, &web());
    sink.publish_now(&web(), &set(1)).unwrap();
    assert_whole(&sink, &web(), &set(1));
    assert_eq!(fs::metadata(&folder).unwrap().uid(), 0);
}

#[test]
fn modes_that_give_keys_away_are_refused() {
    let house = House::new();
    for bad in [0o666, 0o700, 0o200, 0o4600, 0o060, 0o602] {
        let error = house.open_with(&house.secrets(), Access::mode(bad)).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Mode(_)), "{error}");
    }
}

#[test]
fn two_sinks_never_share_a_secrets_folder() {
    let (one, other) = (House::new(), House::new());
    let sink = one.open();
    let error = other.open_with(&one.secrets(), PRIVATE).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("the mica that has the data folder"), "{error}");
    drop(sink);
    other.open_with(&one.secrets(), PRIVATE).unwrap();
}

#[test]
fn a_secrets_folder_that_others_may_write_to_is_refused() {
    let house = House::new();
    fs::create_dir(house.secrets()).unwrap();
    chmod(&house.secrets(), 0o777);
    let error = house.open_with(&house.secrets(), PRIVATE).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("chmod go-w"), "{error}");
}

#[test]
fn a_name_too_long_for_a_file_is_told() {
    let house = House::new();
    let sink = house.open();
    let long = account(&format!("default/{}", "a".repeat(250)));
    for error in [
        sink.read_now(&long).map(|_| ()).unwrap_err(),
        sink.publish_now(&long, &set(1)).unwrap_err(),
        sink.remove_now(&long).unwrap_err(),
    ] {
        assert!(error.to_string().contains("256 bytes"), "{error}");
    }
    sink.announce_now(&[long, web()]).unwrap();
    let longest = account(&format!("default/{}", "a".repeat(249)));
    sink.publish_now(&longest, &set(1)).unwrap();
    assert_whole(&sink, &longest, &set(1));
}

/// What consumers may see at any instant: an old set, a new one, or nothing if there was nothing.
#[track_caller]
fn assert_one_of(house: &House, old: Option<&CertificateSet>, new: Option<&CertificateSet>) {
    let data = house.of(&web()).join("..data");
    let seen = fs::read_link(&data).ok().map(|target| {
        let folder = data.parent().unwrap().join(target);
        delivered(&folder).expect("a whole set behind the link")
    });
    let allowed = [old.map(files_of), new.map(files_of)];
    assert!(allowed.contains(&seen), "{seen:?}");
}

#[test]
fn a_publication_killed_at_any_step_is_healed() {
    for renewal in [false, true] {
        for count in 0.. {
            let house = House::new();
            let sink = house.open();
            let old = renewal.then(|| set(1));
            if let Some(old) = &old {
                sink.publish_now(&web(), &set(0)).unwrap();
                sink.publish_now(&web(), old).unwrap();
            }
            let (_, reached) = fault::killed_after(count, || sink.publish_now(&web(), &set(2)));
            assert_one_of(&house, old.as_ref(), Some(&set(2)));
            drop(sink);
            let sink = house.open();
            match found(&sink, &web()) {
                Found::Absent => assert!(!renewal),
                Found::Damaged(_) => assert!(!renewal, "a renewal leaves a whole set at any time"),
                Found::Set(found) => {
                    assert!(Some(&found.set) == old.as_ref() || found.set == set(2));
                }
                other => panic!("after {count} changes: {other:?}"),
            }
            sink.publish_now(&web(), &set(3)).unwrap();
            assert_whole(&sink, &web(), &set(3));
            sink.remove_now(&web()).unwrap();
            assert_eq!(names(&house.secrets()), [".mica.lock"], "after {count} changes");
            if !reached {
                assert!(count > 8, "too few changes were tried: {count}");
                break;
            }
        }
    }
}

#[test]
fn a_removal_killed_at_any_step_is_finished_later() {
    for count in 0.. {
        let house = House::new();
        let sink = house.open();
        sink.publish_now(&web(), &set(1)).unwrap();
        sink.publish_now(&web(), &set(2)).unwrap();
        let (_, reached) = fault::killed_after(count, || sink.remove_now(&web()));
        assert_one_of(&house, Some(&set(2)), None);
        drop(sink);
        let sink = house.open();
        assert!(!matches!(found(&sink, &web()), Found::Foreign(_)));
        for account in sink.recorded() {
            sink.remove_now(&account).unwrap();
        }
        assert!(!house.of(&web()).exists(), "after {count} changes");
        sink.publish_now(&web(), &set(3)).unwrap();
        assert_whole(&sink, &web(), &set(3));
        if !reached {
            assert!(count > 8, "too few changes were tried: {count}");
            break;
        }
    }
}

#[test]
fn a_full_disk_keeps_the_old_set_and_leaves_no_half_of_a_new_one() {
    for renewal in [false, true] {
        for count in 0.. {
            let house = House::new();
            let sink = house.open();
            let old = renewal.then(|| set(1));
            if let Some(old) = &old {
                sink.publish_now(&web(), old).unwrap();
            }
            let (result, reached) = fault::full_after(count, || sink.publish_now(&web(), &set(2)));
            assert_one_of(&house, old.as_ref(), Some(&set(2)));
            if !reached {
                result.unwrap();
                assert!(count > 8, "too few changes were tried: {count}");
                break;
            }
            if let Err(error) = result {
                assert!(error.to_string().contains("no space left"), "{error}");
            }
            if let (Some(old), Found::Set(found)) = (&old, found(&sink, &web())) {
                assert!(found.set == *old || found.set == set(2));
            } else {
                assert!(!renewal, "the old set is gone");
            }
            sink.publish_now(&web(), &set(3)).unwrap();
            assert_whole(&sink, &web(), &set(3));
            sink.remove_now(&web()).unwrap();
            assert_eq!(names(&house.secrets()), [".mica.lock"]);
        }
    }
}

#[test]
fn a_really_full_disk_is_told_and_survived() {
    if !rustix::process::geteuid().is_root() {
        panic!("run the tests as root, in a container say: mounting a small disk needs it");
    }
    let house = House::new();
    let disk = house.folder.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let done = std::process::Command::new(program).args(arguments).status().unwrap();
        assert!(done.success(), "{program} {arguments:?}");
    };
    let path = disk.to_str().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=256k,mode=0700", "none", path]);
    let outcome = std::panic::catch_unwind(|| {
        let sink = house.open_with(&disk.join("secrets"), PRIVATE).unwrap();
        let large = CertificateSet { chain_pem: "x".repeat(30_000), ..set(1) };
        let mut whole = Vec::new();
        let error = (0..100)
            .map(|number| account(&format!("default/a{number}")))
            .find_map(|account| {
                let result = sink.publish_now(&account, &large);
                whole.push(account);
                result.err()
            })
            .expect("the disk was to be full by now");
        assert!(error.to_string().contains("no space left"), "{error}");
        let failed = whole.pop().unwrap();
        assert!(whole.len() > 2);
        assert_eq!(found(&sink, &failed), Found::Absent);
        // A renewal has no room either.
        sink.publish_now(&whole[0], &large).unwrap_err();
        for account in &whole {
            assert_whole(&sink, account, &large);
        }
        sink.remove_now(&whole[1]).unwrap();
        sink.publish_now(&whole[0], &large).unwrap();
        assert_whole(&sink, &whole[0], &large);
    });
    run("umount", &["-l", path]);
    outcome.unwrap();
}

#[test]
fn a_secrets_folder_that_is_removed_is_made_again() {
    let house = House::new();
    let sink = house.open();
    sink.publish_now(&web(), &set(1)).unwrap();
    fs::remove_dir_all(house.secrets()).unwrap();
    assert_eq!(found(&sink, &web()), Found::Absent);
    sink.publish_now(&web(), &set(2)).unwrap();
    assert_whole(&sink, &web(), &set(2));
    assert_eq!(delivered(&house.of(&web())), Some(files_of(&set(2))));
    let other = House::new();
    let error = other.open_with(&house.secrets(), PRIVATE).map(|_| ());
    assert!(error.unwrap_err().to_string().contains("the mica that has the data folder"), "locked again");
}

#[test]
fn many_threads_publish_and_remove_at_once() {
    let house = House::new();
    let sink = house.open();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let sink = &sink;
            scope.spawn(move || {
                for round in 0..60 {
                    // One namespace that is made and removed all the time, and one account that all fight for.
                    let own = account(&format!("busy/a{thread}"));
                    sink.publish_now(&own, &set(round)).unwrap();
                    assert_whole(sink, &own, &set(round));
                    sink.publish_now(&web(), &set(round)).unwrap();
                    sink.remove_now(&own).unwrap();
                }
            });
        }
    });
    assert!(matches!(found(&sink, &web()), Found::Set(_)));
    assert_eq!(sink.recorded(), [web()]);
    assert_eq!(names(&house.secrets()), [".mica.lock", "default"]);
}

/// What is told until nothing more is to come.
async fn told(sink: &FolderSink) -> Vec<ServiceAccount> {
    let mut all = Vec::new();
    loop {
        match tokio::time::timeout(Duration::from_millis(60), sink.disturbed()).await {
            Ok(more) => {
                assert!(!more.is_empty());
                all.extend(more);
            }
            Err(_) => {
                let eyes = sink.eyes.lock().await;
                if eyes.is_settled() && locked(&sink.state).pending.is_empty() {
                    break;
                }
            }
        }
    }
    all.sort();
    all
}

#[track_caller]
fn assert_told(told: &[ServiceAccount], expected: &[ServiceAccount]) {
    assert_eq!(told, expected);
}

fn two_accounts(house: &House) -> (FolderSink, ServiceAccount) {
    let sink = house.open();
    let api = account("default/api");
    for account in [&web(), &api] {
        sink.publish_now(account, &set(1)).unwrap();
    }
    (sink, api)
}

#[tokio::test]
async fn our_own_changes_are_not_told() {
    let house = House::new();
    let (sink, api) = two_accounts(&house);
    assert_told(&told(&sink).await, &[]);
    sink.publish_now(&web(), &set(2)).unwrap();
    found(&sink, &api);
    assert_told(&told(&sink).await, &[]);
    sink.remove_now(&api).unwrap();
    sink.publish_now(&account("new/one"), &set(1)).unwrap();
    assert_told(&told(&sink).await, &[]);
    // What readers of the set before may still have needed is gone by now.
    tokio::time::timeout(Duration::from_millis(1500), sink.disturbed()).await.unwrap_err();
    assert_eq!(names(&house.of(&web())).len(), 5);
    assert_whole(&sink, &web(), &set(2));
    assert!(sink.unchanged(&web()));
}

#[tokio::test]
async fn damage_is_told_soon_and_once() {
    let house = House::new();
    let lure = house.folder.path().join("lure");
    fs::create_dir(&lure).unwrap();
    let (sink, _) = two_accounts(&house);
    let mut accounts = Vec::new();
    for number in 10..10 + PLANTED.len() {
        accounts.push(account(&format!("planted/a{number}")));
    }
    for account in &accounts {
        sink.publish_now(account, &set(1)).unwrap();
    }
    assert_told(&told(&sink).await, &[]);
    for (account, (_, plant)) in accounts.iter().zip(PLANTED) {
        plant(&house.of(account), &lure);
    }
    let planted = tokio::time::Instant::now();
    let mut soon = Vec::new();
    while soon.len() < accounts.len() {
        soon.extend(
            tokio::time::timeout(Duration::from_millis(900), sink.disturbed())
                .await
                .unwrap_or_else(|_| panic!("only these were told in time: {soon:?}")),
        );
    }
    assert!(planted.elapsed() < Duration::from_millis(900));
    soon.sort();
    assert_told(&soon, &accounts);
    assert_told(&told(&sink).await, &[]);
    for account in &accounts {
        sink.publish_now(account, &set(2)).unwrap();
    }
    assert_told(&told(&sink).await, &[]);
    // The repaired ones are watched like the first.
    for account in &accounts {
        fs::remove_file(house.of(account).join("..data/key.pem")).unwrap();
    }
    assert_told(&told(&sink).await, &accounts);
}

#[tokio::test]
async fn changed_contents_and_permissions_are_told() {
    let house = House::new();
    let (sink, api) = two_accounts(&house);
    assert_told(&told(&sink).await, &[]);
    let changes: [&dyn Fn(); 5] = [
        &|| fs::write(house.of(&web()).join("key.pem"), "key 2\n").unwrap(),
        &|| chmod(&house.of(&web()).join("..data/key.pem"), 0o644),
        &|| chmod(&house.of(&web()), 0o755),
        &|| chmod(&fs::canonicalize(house.of(&web()).join("..data")).unwrap(), 0o755),
        &|| fs::write(house.of(&web()).join("notes.txt"), "x").unwrap(),
    ];
    for change in changes {
        change();
        assert_told(&told(&sink).await, &[web()]);
        found(&sink, &web());
        assert_told(&told(&sink).await, &[]);
    }
    chmod(&house.secrets().join("default"), 0o755);
    assert_told(&told(&sink).await, &[api.clone(), web()]);
    for account in [&api, &web()] {
        loose(&sink, account);
        sink.publish_now(account, &set(3)).unwrap();
        assert_whole(&sink, account, &set(3));
    }
}

#[tokio::test]
async fn a_folder_that_vanishes_is_told_at_every_level() {
    let house = House::new();
    let (sink, api) = two_accounts(&house);
    let other = account("other/web");
    sink.publish_now(&other, &set(1)).unwrap();
    assert_told(&told(&sink).await, &[]);
    let all = [api.clone(), web(), other.clone()];
    let away = house.folder.path().join("away");
    let default = house.secrets().join("default");
    type Step<'a> = (&'a str, &'a dyn Fn(), &'a [ServiceAccount]);
    let steps: [Step; 6] = [
        ("account removed", &|| fs::remove_dir_all(house.of(&web())).unwrap(), &[web()]),
        ("account moved", &|| fs::rename(house.of(&web()), away.join("a")).unwrap(), &[web()]),
        ("namespace removed", &|| fs::remove_dir_all(&default).unwrap(), &all[..2]),
        ("namespace moved", &|| fs::rename(&default, away.join("b")).unwrap(), &all[..2]),
        ("all removed", &|| fs::remove_dir_all(house.secrets()).unwrap(), &all),
        ("all moved", &|| fs::rename(house.secrets(), away.join("c")).unwrap(), &all),
    ];
    fs::create_dir(&away).unwrap();
    // Twice, because what is made again gets the same inodes.
    for round in 0..2 {
        for (what, step, expected) in &steps {
            step();
            let seen = told(&sink).await;
            assert_eq!(seen, *expected, "{what} in round {round}");
            for account in *expected {
                assert_eq!(found(&sink, account), Found::Absent, "{what}");
                sink.publish_now(account, &set(2)).unwrap();
            }
            // The end of a folder that we held open is told late, which costs a look at what replaced it.
            for account in told(&sink).await {
                found(&sink, &account);
            }
            assert_told(&told(&sink).await, &[]);
            for account in &all {
                assert!(matches!(found(&sink, account), Found::Set(_)), "{what}");
            }
        }
        fs::remove_dir_all(&away).unwrap();
        fs::create_dir(&away).unwrap();
    }
}

#[tokio::test]
async fn a_foreign_folder_that_is_moved_away_is_told() {
    let house = House::new();
    fs::create_dir_all(house.of(&web())).unwrap();
    let linked = account("linked/web");
    symlink("default", house.secrets().join("linked")).unwrap();
    let sink = house.open();
    foreign(&sink, &web());
    foreign(&sink, &linked);
    assert_told(&told(&sink).await, &[]);
    fs::remove_dir(house.of(&web())).unwrap();
    assert_told(&told(&sink).await, &[web()]);
    fs::remove_file(house.secrets().join("linked")).unwrap();
    assert_told(&told(&sink).await, &[linked]);
}

#[tokio::test]
async fn above_the_limit_of_watches_a_sweep_sees_the_same() {
    let house = House::new();
    let (sink, api) = two_accounts(&house);
    sink.eyes.lock().await.most = Some(0);
    assert_told(&told(&sink).await, &[]);
    assert_eq!(locked(&sink.state).unwatched, 2);
    fs::write(house.of(&web()).join("key.pem"), "key 2\n").unwrap();
    let soon = tokio::time::timeout(Duration::from_secs(3), sink.disturbed()).await.unwrap();
    assert_told(&soon, &[web()]);
    found(&sink, &web());
    fs::remove_dir_all(house.secrets().join("default")).unwrap();
    let mut soon = tokio::time::timeout(Duration::from_secs(3), sink.disturbed()).await.unwrap();
    soon.sort();
    assert_told(&soon, &[api, web()]);
}

#[tokio::test]
async fn lost_events_make_us_look_at_everything() {
    let house = House::new();
    let (sink, api) = two_accounts(&house);
    assert_told(&told(&sink).await, &[]);
    {
        let mut eyes = sink.eyes.lock().await;
        // As if nothing had been heard of it.
        eyes.deaf();
        fs::remove_file(house.of(&api).join("key.pem")).unwrap();
        sink.note(&mut eyes, vec![crate::sys::watch::Event::Overflow]);
    }
    assert_told(&told(&sink).await, &[api]);
}

#[tokio::test]
async fn a_call_that_is_given_up_loses_nothing() {
    let house = House::new();
    let (sink, _) = two_accounts(&house);
    assert_told(&told(&sink).await, &[]);
    fs::remove_file(house.of(&web()).join("key.pem")).unwrap();
    for _ in 0..40 {
        let short = tokio::time::timeout(Duration::from_millis(15), sink.disturbed()).await;
        if let Ok(told) = short {
            assert_told(&told, &[web()]);
            return;
        }
    }
    panic!("never told");
}

#[tokio::test]
async fn nothing_is_done_while_nothing_happens() {
    let house = House::new();
    let (sink, _) = two_accounts(&house);
    assert_told(&told(&sink).await, &[]);
    sink.publish_now(&web(), &set(2)).unwrap();
    // The earlier set goes in this time.
    let _ = tokio::time::timeout(Duration::from_millis(1600), sink.disturbed()).await;
    let eyes = sink.eyes.lock().await;
    assert_eq!(eyes.next_wake(), None);
}

#[test]
fn little_is_kept_for_an_account() {
    // With its entry in the index, the name itself and two watches this is some 250 bytes.
    assert!(size_of::<Slot>() <= 112, "{}", size_of::<Slot>());
}
