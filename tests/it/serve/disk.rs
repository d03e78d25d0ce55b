//! Folders that are full, or gone, while Mica runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Place, wait_for};
use crate::fixtures::run;

/// A small file system in memory, which needs root; gone with this.
pub(crate) struct Small(PathBuf);

impl Small {
    pub(crate) fn mount(folder: &Path) -> Self {
        fs::create_dir_all(folder).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=512k,mode=700", "none"]).arg(folder));
        Self(folder.to_owned())
    }

    pub(crate) fn fill(&self) {
        let mut size = 512 * 1024;
        for n in 0.. {
            if fs::write(self.0.join(format!("fill{n}")), vec![0; size]).is_err() {
                size /= 2;
            }
            if size == 0 {
                break;
            }
        }
    }

    pub(crate) fn empty(&self) {
        for entry in fs::read_dir(&self.0).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_string_lossy().starts_with("fill") {
                fs::remove_file(path).unwrap();
            }
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_below_the_secrets_loses_nothing_and_is_told() {
    let place = Place::new();
    place.account("web");
    let small = Small::mount(&place.data().join("secrets"));
    fs::set_permissions(place.data(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mica = place.start(&["--ttl", "20s"]);
    let serial = place.serial("web");
    small.fill();
    place.account("db");
    wait_for(Duration::from_secs(5), "a report", || {
        mica.log().contains("no space left on device").then_some(())
    });
    // Nothing half written is there for a reader, neither for the new one nor for one that is due for renewal.
    wait_for(Duration::from_secs(15), "a failed renewal", || {
        mica.log().lines().any(|l| l.contains("shop/web") && l.contains("no space")).then_some(())
    });
    assert_eq!(place.serial("web"), serial);
    assert!(!place.folder("shop", "db").join("..data").exists());
    small.empty();
    place.wait_for_account("db", Duration::from_secs(8));
    place.wait_for_another("web", &serial, Duration::from_secs(8));
    mica.stop();
}

#[test]
fn a_full_disk_below_the_data_folder_makes_no_half_of_an_authority() {
    let place = Place::new();
    place.account("web");
    let small = Small::mount(&place.data());
    small.fill();
    let output = super::output_within(&mut place.command(), Duration::from_secs(20));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("no space left on device"), "{error}");
    assert!(!place.data().join("authority").exists() && !place.data().join("root-cert.pem").exists());
    small.empty();
    place.start(&[]).stop();
}

#[test]
fn without_its_data_folder_mica_is_not_ready_and_makes_no_other() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&[]);
    let http = mica.address("http");
    let away = place.root.path().join("away");
    fs::rename(place.data(), &away).unwrap();
    let (status, why) = super::page(&http, "/readyz");
    assert!(status == 503 && why.contains("another root"), "{status} {why}");
    place.account("db");
    wait_for(Duration::from_secs(5), "a report", || {
        mica.log().contains("nothing is delivered while the data folder").then_some(())
    });
    assert!(!place.data().exists());
    // Put back as it was, it is as it was.
    fs::rename(&away, place.data()).unwrap();
    wait_for(Duration::from_secs(5), "readiness", || (mica.page("/readyz").0 == 200).then_some(()));
    place.wait_for_account("db", Duration::from_secs(20));
    fs::remove_dir_all(place.data()).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(super::page(&http, "/readyz").0, 503);
    assert!(!place.data().exists());
    mica.stop();
}
