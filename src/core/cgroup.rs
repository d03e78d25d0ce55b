//! Which pod and container a process is in, by its control groups as `/proc/PID/cgroup` has them: version 1 and 2, kubelets
//! with either driver, and container runtimes as they name what they make.
//!
//! Whoever may make control groups below its own can give them any name. So only what stands above the pod's group
//! decides, and all of it has to be of a kubelet's making: the outermost pod counts, and one below a user's session, a
//! service or a container is none.

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// UID of the pod, in lower case.
    pub pod: String,
    /// What the runtime calls the container; none for what runs in the pod's own group.
    pub id: Option<String>,
}

/// The container that all hierarchies agree on; none for a process that is in no pod. What a kubelet makes counts below
/// [`above`] alone.
pub fn container(control_groups: &str, above: &str) -> Option<Container> {
    let mut found: Option<Container> = None;
    for path in paths(control_groups) {
        let Some(here) = path.strip_prefix(above).and_then(in_path) else { continue };
        match &found {
            Some(before) if *before != here => return None,
            _ => found = Some(here),
        }
    }
    found
}

/// Where the kubelet has its groups, if that is a place of its own (`cgroupRoot`, a node that is a container), by those of
/// a process that is in a pod itself. Empty for any other.
pub fn above(control_groups: &str) -> &str {
    let found = paths(control_groups).find_map(|path| {
        let mut slashes = path.match_indices('/');
        slashes.find_map(|(at, _)| in_path(&path[at..]).map(|_| &path[..at]))
    });
    found.unwrap_or_default()
}

fn paths(control_groups: &str) -> impl Iterator<Item = &str> {
    control_groups.lines().filter_map(|line| line.splitn(3, ':').nth(2))
}

fn in_path(path: &str) -> Option<Container> {
    let mut parts = path.strip_prefix('/')?.split('/').peekable();
    // Seen from a namespace of control groups of one's own.
    while parts.next_if_eq(&"..").is_some() {}
    // A node that is a container of Docker's itself.
    if parts.next_if_eq(&"docker").is_some() {
        parts.next().filter(|id| is_id(id))?;
    } else if parts.peek() == Some(&"system.slice") {
        parts.next();
        let unit = parts.next()?;
        let inner = unit.strip_prefix("docker-").and_then(|rest| rest.strip_suffix(".scope"));
        if !inner.is_some_and(is_id) {
            // A containerd that was told of no driver, below its own service.
            let group = parts.next().filter(|_| is_runtime(unit))?;
            return of_colons(group);
        }
    }
    loop {
        let part = parts.next()?;
        if let Some(pod) = pod(part) {
            let id = parts.next().and_then(container_id);
            return Some(Container { pod, id });
        }
        if !is_kubelets(part) {
            return of_colons(part);
        }
    }
}

/// `kubepods-burstable-pod<uid>.slice:cri-containerd:<id>`
fn of_colons(group: &str) -> Option<Container> {
    let mut parts = group.split(':');
    let (slice, runtime, id) = (parts.next()?, parts.next()?, parts.next()?);
    let sound = parts.next().is_none() && matches!(runtime, "cri-containerd" | "crio" | "docker");
    Some(Container { pod: pod(slice)?, id: Some(id.to_owned()).filter(|id| sound && is_id(id)) })
        .filter(|container| container.id.is_some())
}

fn is_runtime(unit: &str) -> bool {
    matches!(
        unit,
        "containerd.service" | "crio.service" | "docker.service" | "k3s.service" | "k3s-agent.service"
    )
}

/// What stands above a pod's group: `kubepods`, its classes of service, and the kubelet's own roots, as names of folders
/// or of slices.
fn is_kubelets(part: &str) -> bool {
    let name = part.strip_suffix(".slice").unwrap_or(part);
    let name = name.strip_prefix("kubelet-").unwrap_or(name);
    matches!(
        name,
        "kubelet" | "kubepods" | "burstable" | "besteffort" | "kubepods-burstable" | "kubepods-besteffort"
    )
}

/// `pod<uid>`, or `kubepods-besteffort-pod<uid>.slice` with underscores for hyphens.
fn pod(part: &str) -> Option<String> {
    let uid = match part.strip_suffix(".slice") {
        Some(slice) => {
            let (above, uid) = slice.rsplit_once("-pod")?;
            is_kubelets(above).then(|| uid.replace('_', "-"))?
        }
        None => part.strip_prefix("pod")?.to_owned(),
    };
    is_uid(&uid).then_some(uid)
}

/// As the API server makes them, or the digest that a static pod has.
fn is_uid(text: &str) -> bool {
    let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    (lengths == [8, 4, 4, 4, 12] || lengths == [32]) && text.split('-').all(is_hex)
}

/// `<id>`, or `cri-containerd-<id>.scope`.
fn container_id(part: &str) -> Option<String> {
    let id = match part.strip_suffix(".scope") {
        Some(scope) => {
            let known = ["cri-containerd-", "crio-", "docker-", "libpod-"];
            known.into_iter().find_map(|runtime| scope.strip_prefix(runtime))?
        }
        None => part.strip_prefix("crio-").unwrap_or(part),
    };
    is_id(id).then(|| id.to_owned())
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "2c48913c-b29f-11e7-9350-020968147796";
    const UNDERSCORED: &str = "2c48913c_b29f_11e7_9350_020968147796";
    const STATIC: &str = "7f2b1ac4e6a1f8c1d2e3f40516273849";
    const ID: &str = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961";
    const NODE: &str = "3b3f6fa1b07350e01359619bca8d63d5fa610783847915bcff0ecac1273e5b4be";

    fn path(form: &str) -> String {
        form.replace("UID", UID)
            .replace("U_D", UNDERSCORED)
            .replace("STATIC", STATIC)
            .replace("NODE", &NODE[..64])
            .replace("CID", ID)
    }

    #[test]
    fn a_container_is_found_wherever_a_kubelet_puts_it() {
        for form in [
            // cgroupfs: guaranteed, burstable, best effort; the same in both versions.
            "/kubepods/podUID/CID",
            "/kubepods/burstable/podUID/CID",
            "/kubepods/besteffort/podUID/CID",
            "/kubepods/besteffort/podUID/crio-CID",
            // systemd.
            "/kubepods.slice/kubepods-podU_D.slice/cri-containerd-CID.scope",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_D.slice/cri-containerd-CID.scope",
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_D.slice/crio-CID.scope",
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_D.slice/crio-CID.scope/container",
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_D.slice/docker-CID.scope",
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_D.slice/libpod-CID.scope",
            // kind, with either driver, and seen from outside of it.
            "/kubelet/kubepods/besteffort/podUID/CID",
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-podU_D.slice/cri-containerd-CID.scope",
            "/docker/NODE/kubepods/burstable/podUID/CID",
            "/docker/NODE/kubelet/kubepods/burstable/podUID/CID",
            "/docker/NODE/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podU_D.slice/cri-containerd-CID.scope",
            "/system.slice/docker-NODE.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podU_D.slice/cri-containerd-CID.scope",
            // A runtime of another driver than the kubelet's.
            "/kubepods-burstable-podU_D.slice:cri-containerd:CID",
            "/system.slice/containerd.service/kubepods-burstable-podU_D.slice:cri-containerd:CID",
            "/system.slice/k3s.service/kubepods-besteffort-podU_D.slice:cri-containerd:CID",
            // From a namespace of control groups of one's own.
            "/../../podUID/CID",
            "/../../../burstable/podUID/CID",
            "/../../kubepods-besteffort-podU_D.slice/cri-containerd-CID.scope",
            "/../../../kubepods-burstable.slice/kubepods-burstable-podU_D.slice/cri-containerd-CID.scope",
            // What a container makes of its own, whatever it calls it.
            "/kubepods/burstable/podUID/CID/system.slice/web.service",
            "/kubepods/burstable/podUID/CID/kubepods/pod11111111-b29f-11e7-9350-020968147796/CID",
        ] {
            for line in ["0::", "11:memory:", "4:name=systemd:"] {
                let found = container(&format!("{line}{}\n", path(form)), "");
                let wanted = Container { pod: UID.to_owned(), id: Some(ID.to_owned()) };
                assert_eq!(found, Some(wanted), "{form}");
            }
        }
        let sound = container(&path("0::/kubepods/burstable/podSTATIC/CID"), "").unwrap();
        assert_eq!(sound.pod, STATIC);
        for form in
            ["0::/kubepods/podUID", "0::/kubepods.slice/kubepods-podU_D.slice", "0::/kubepods/podUID/mine"]
        {
            let wanted = Container { pod: UID.to_owned(), id: None };
            assert_eq!(container(&path(form), ""), Some(wanted), "{form}");
        }
    }

    #[test]
    fn what_a_kubelet_did_not_make_is_no_pod() {
        for form in [
            "/",
            "",
            "/kubepods",
            "/kubepods/burstable",
            "/system.slice/kubelet.service",
            "/system.slice/web.service/kubepods/podUID/CID",
            "/system.slice/web.service/kubepods-podU_D.slice:cri-containerd:CID",
            "/system.slice/kubepods/podUID/CID",
            "/user.slice/user-1000.slice/user@1000.service/kubepods/podUID/CID",
            "/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-podU_D.slice/cri-containerd-CID.scope",
            "/../../user.slice/user-1000.slice/user@1000.service/podUID/CID",
            "/docker/CID",
            "/docker/web/kubepods/podUID/CID",
            "/docker/NODE/web/kubepods/podUID/CID",
            "/machine.slice/libpod-CID.scope",
            "/kubepods/web/podUID/CID",
            "/kubepods/../podUID/CID",
            "/kubepods/burstable/podUID2/CID",
            "/kubepods/burstable/pod../CID",
            "/kubepods/burstable/POD2C48913C-B29F-11E7-9350-020968147796/CID",
            "/web.slice/web-podU_D.slice/cri-containerd-CID.scope",
            "/kubepods.slice/web-podU_D.slice/cri-containerd-CID.scope",
            "kubepods/podUID/CID",
        ] {
            assert_eq!(container(&path(&format!("0::{form}")), ""), None, "{form}");
        }
        assert_eq!(container(&path("/kubepods/podUID/CID"), ""), None);
    }

    #[test]
    fn all_hierarchies_have_to_agree() {
        let same =
            path("5:cpu:/kubepods/podUID/CID\n4:memory:/kubepods/podUID/CID\n1:name=systemd:/\n0::/\n");
        assert_eq!(container(&same, "").unwrap().pod, UID);
        let other = same.replacen(UID, "11111111-b29f-11e7-9350-020968147796", 1);
        assert_eq!(container(&other, ""), None);
    }

    #[test]
    fn an_agent_in_a_pod_knows_where_its_kubelet_puts_pods() {
        let agent =
            path("5:cpu:/node-1/kubepods/burstable/podU/CID\n4:memory:/node-1/kubepods/podUID/CID\n0::/\n");
        assert_eq!(above(&agent), "/node-1");
        for (form, is_found) in [
            ("/node-1/kubepods/besteffort/podUID/CID", true),
            ("/node-1/kubepods.slice/kubepods-podU_D.slice/cri-containerd-CID.scope", true),
            ("/node-1/web/kubepods/podUID/CID", false),
            ("/node-1/system.slice/web.service/kubepods/podUID/CID", false),
            ("/node-2/kubepods/podUID/CID", false),
            ("/node-10/kubepods/podUID/CID", false),
            ("/kubepods/podUID/CID", false),
            ("/node-1kubepods/podUID/CID", false),
        ] {
            let found = container(&path(&format!("0::{form}")), above(&agent));
            assert_eq!(found.is_some(), is_found, "{form}");
        }
        for (form, wanted) in [
            ("/lxc/one/kubepods.slice/kubepods-podU_D.slice/cri-containerd-CID.scope", "/lxc/one"),
            // Its own groups below it are its own.
            ("/kubepods/podUID/CID/kubepods/podUID/CID", ""),
            ("/../../podUID/CID", ""),
            ("/docker/NODE/kubepods/podUID/CID", ""),
            ("/system.slice/mica.service", ""),
            ("/", ""),
            ("", ""),
        ] {
            assert_eq!(above(&path(&format!("0::{form}"))), wanted, "{form}");
        }
    }
}
