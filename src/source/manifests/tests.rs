use super::*;

/// The accounts of a text without faults, as `namespace/name`.
#[track_caller]
fn names(text: &str) -> Vec<String> {
    let found = accounts_in(text.as_bytes());
    assert_eq!(found.faults, [], "in {text}");
    found.accounts.iter().map(ToString::to_string).collect()
}

/// The accounts and faults of a text.
fn read(text: impl AsRef<[u8]>) -> (Vec<String>, Vec<String>) {
    let found = accounts_in(text.as_ref());
    (
        found.accounts.iter().map(ToString::to_string).collect(),
        found.faults.iter().map(ToString::to_string).collect(),
    )
}

fn account(name: &str) -> String {
    format!("apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: {name}\n")
}

#[test]
fn a_service_account_names_itself() {
    assert_eq!(names(&account("web")), ["default/web"]);
    assert_eq!(
        names("{apiVersion: v1, kind: ServiceAccount, metadata: {name: web, namespace: shop}}"),
        ["shop/web"]
    );
    for none in ["", "null", "~", "''"] {
        assert_eq!(names(&format!("{}  namespace: {none}\n", account("web"))), ["default/web"]);
    }
}

#[test]
fn every_built_in_workload_names_the_account_of_its_pods() {
    let pod = "{spec: {serviceAccountName: web, containers: []}}";
    let job = format!("{{spec: {{template: {pod}}}}}");
    for (version, kind, body) in [
        ("v1", "Pod", "spec: {serviceAccountName: web}".to_owned()),
        ("v1", "PodTemplate", format!("template: {pod}")),
        ("v1", "ReplicationController", format!("spec: {{template: {pod}}}")),
        ("apps/v1", "Deployment", format!("spec: {{template: {pod}}}")),
        ("extensions/v1beta1", "Deployment", format!("spec: {{template: {pod}}}")),
        ("apps/v1beta2", "ReplicaSet", format!("spec: {{template: {pod}}}")),
        ("apps/v1", "StatefulSet", format!("spec: {{template: {pod}}}")),
        ("apps/v1", "DaemonSet", format!("spec: {{template: {pod}}}")),
        ("batch/v1", "Job", format!("spec: {{template: {pod}}}")),
        ("batch/v1", "CronJob", format!("spec: {{jobTemplate: {job}}}")),
    ] {
        let head = format!("apiVersion: {version}\nkind: {kind}\n");
        let metadata = "metadata: {generateName: x-, namespace: shop}\n";
        assert_eq!(names(&format!("{head}{metadata}{body}")), ["shop/web"], "{kind}");
        // The order of keys says nothing.
        assert_eq!(names(&format!("{body}\n{metadata}{head}")), ["shop/web"], "{kind}");
        let unnamed = body.replace("serviceAccountName: web", "serviceAccountName: ''");
        assert_eq!(names(&format!("{head}{metadata}{unnamed}")), ["shop/default"], "{kind}");
        let older = body.replace("serviceAccountName", "serviceAccount");
        assert_eq!(names(&format!("{head}{metadata}{older}")), ["shop/web"], "{kind}");
        for foreign in ["example.com/v1", "apps.example.com/v1", "other/v1"] {
            let head = format!("apiVersion: {foreign}\nkind: {kind}\n");
            assert_eq!(names(&format!("{head}{metadata}{body}")), [""; 0], "{kind}");
        }
    }
}

#[test]
fn the_newer_name_of_the_field_wins() {
    assert_eq!(
        names("{apiVersion: v1, kind: Pod, spec: {serviceAccount: old, serviceAccountName: new}}"),
        ["default/new"]
    );
}

#[test]
fn what_makes_no_pod_makes_no_account() {
    for text in [
        "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}",
        "{apiVersion: v1, kind: ConfigMap, data: {kind: ServiceAccount}}",
        "{apiVersion: apps/v1, kind: Deployment, spec: {replicas: 1}}",
        "{apiVersion: v1, kind: ReplicationController, spec: {template: null}}",
        "{apiVersion: v1, kind: Pod, metadata: {name: x}}",
        "{apiVersion: example.com/v1, kind: Odd, metadata: 7, spec: text, template: [1], items: {a: b}}",
        "{apiVersion: example.com/v1, kind: ServiceAccount, metadata: {name: web}}",
        "{apiVersion: example.com/v1, kind: FooList, items: [{metadata: {name: web}}]}",
        "{replicas: 3, image: {tag: x}}",
        "- hosts: all\n  tasks: []\n",
        "just text",
        "42",
        "kind: 42",
        "kind:",
    ] {
        match text {
            "kind: 42" => assert_eq!(read(text).1.len(), 1),
            _ => assert_eq!(names(text), [""; 0], "{text}"),
        }
    }
}

#[test]
fn lists_typed_and_nested() {
    let text = "
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: ServiceAccountList
  items:
  - metadata: {name: a}
  - {apiVersion: apps/v1, kind: Deployment, spec: {template: {spec: {serviceAccountName: b}}}}
- apiVersion: v1
  kind: List
  items:
  - {apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: ServiceAccount, metadata: {name: c}}]}
- apiVersion: apps/v1
  kind: DeploymentList
  items:
  - metadata: {namespace: shop}
    spec: {template: {spec: {}}}
- apiVersion: v1
  kind: PodList
  items: [{spec: {serviceAccountName: d}}]
- apiVersion: v1
  kind: ConfigMapList
  items: [{data: {}}]
";
    let all = ["default/a", "default/b", "default/c", "shop/default", "default/d"];
    assert_eq!(names(text), all);
    for empty in ["null", "[]"] {
        assert_eq!(names(&format!("{{apiVersion: v1, kind: List, items: {empty}}}")), [""; 0]);
    }
}

#[test]
fn a_bad_item_costs_nothing_but_itself() {
    let (accounts, faults) = read(
            "apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: ServiceAccount, metadata: {name: a}}
- {apiVersion: v1, kind: ServiceAccount, metadata: {name: Upper_Case}}
- {metadata: {name: b}}
- 7
-
- {apiVersion: v1, kind: ServiceAccountList, items: [{metadata: {name: c, namespace: '-'}}, {metadata: {name: d}}]}
- {kind: ServiceAccount, metadata: {name: e}}
",
        );
    assert_eq!(accounts, ["default/a", "default/d"]);
    assert_eq!(
        faults,
        [
            "document 1: items[1]: ServiceAccount: service account \"Upper_Case\" is no Kubernetes name: 1 to 253 of a-z, 0-9, '-' and '.', each part beginning and ending with a letter or digit",
            "document 1: items[2]: object: it carries no kind",
            "document 1: items[3] is the number 7, not an object",
            "document 1: items[5].items[0]: ServiceAccount: namespace \"-\" is no Kubernetes name: 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
            "document 1: items[6]: ServiceAccount: it carries no apiVersion",
        ]
    );
}

#[test]
fn values_that_kubernetes_would_refuse_are_named() {
    for (text, told) in [
        ("{apiVersion: v1, kind: ServiceAccount}", "ServiceAccount: it has no metadata.name"),
        ("{apiVersion: v1, kind: ServiceAccount, metadata: {generateName: x-}}", "no metadata.name"),
        ("{apiVersion: v1, kind: ServiceAccount, metadata: [a]}", "metadata is a list, not a mapping"),
        (
            "{apiVersion: v1, kind: ServiceAccount, metadata: {name: 17}}",
            "metadata.name is the number 17, not text; put it in quotes",
        ),
        ("{apiVersion: v1, kind: ServiceAccount, metadata: {name: on}}", "metadata.name is true, not text"),
        (
            "{apiVersion: v1, kind: ServiceAccount, metadata: {name: {a: b}}}",
            "metadata.name is a mapping, not text",
        ),
        ("{apiVersion: v1, kind: ServiceAccount, metadata: {name: ../x}}", "service account \"../x\" is no"),
        ("{apiVersion: v1, kind: Pod, metadata: {namespace: a.b}, spec: {}}", "Pod: namespace \"a.b\" is no"),
        (
            "{apiVersion: v1, kind: Pod, spec: {serviceAccountName: 1.5}}",
            "serviceAccountName is the number 1.5",
        ),
        ("{apiVersion: v1, kind: Pod, spec: text}", "spec is text, not a mapping"),
        (
            "{apiVersion: apps/v1, kind: Deployment, spec: {template: {spec: [1]}}}",
            "spec.template.spec is a list",
        ),
        (
            "{apiVersion: batch/v1, kind: CronJob, spec: {jobTemplate: {spec: {template: 1}}}}",
            "spec.jobTemplate.spec.template is the number 1",
        ),
        ("{apiVersion: v1, kind: List, items: {}}", "List: items is a mapping, not a list"),
        ("{apiVersion: 1, kind: List}", "List: apiVersion is the number 1, not text"),
        ("{kind: Pod}", "Pod: it carries no apiVersion"),
    ] {
        let (accounts, faults) = read(text);
        assert_eq!(accounts, [""; 0], "{text}");
        assert_eq!(faults.len(), 1, "{text}: {faults:?}");
        assert!(faults[0].contains(told), "{text}: {faults:?}");
        // The same in JSON, where the text is JSON too.
        let json = serde_saphyr::from_str::<serde_json::Value>(text).unwrap();
        assert!(read(json.to_string()).1[0].contains(told), "{json}");
    }
}

#[test]
fn documents_are_cut_as_yaml_says_and_counted() {
    let (a, b) = (account("a"), account("b"));
    let bad = "kind: [\n";
    for (text, accounts, document) in [
        (format!("{a}---\n{b}"), 2, 0),
        (format!("---\n{a}---\n{b}---\n"), 2, 0),
        (format!("--- # first\n{a}--- \n{b}..."), 2, 0),
        (format!("---\n{bad}---\n{b}"), 1, 1),
        (format!("{a}---\n{bad}---\n{b}"), 2, 2),
        (format!("---\n---\n---\n{bad}---\n{b}"), 1, 3),
        (format!("# only a comment\n\n---\n{bad}---\n{b}"), 1, 1),
        (format!("%YAML 1.2\n# x\n---\n{a}...\n%YAML 1.2\n---\n{b}...\n{bad}"), 2, 3),
        (format!("{a}...\n{b}"), 2, 0),
        (format!("{a}...\n# comment\n...\n---\n{b}---\n{bad}"), 2, 3),
        (format!("\u{feff}---\n{a}\u{feff}---\n{b}"), 2, 0),
        (format!("\u{feff}{a}"), 1, 0),
        (format!("--- {{apiVersion: v1, kind: ServiceAccount, metadata: {{name: a}}}}\n---\n{b}"), 2, 0),
        ("---\n# nothing\n...\n".to_owned(), 0, 0),
        ("--- |\n  text\n---\n- list\n---\n'quoted'\n".to_owned(), 0, 0),
        (format!("a: |\n  ---\n  {bad}---\n{b}"), 1, 0),
    ] {
        for text in [text.clone(), text.replace('\n', "\r\n"), text.replace('\n', "\r")] {
            let found = accounts_in(text.as_bytes());
            assert_eq!(found.accounts.len(), accounts, "{text:?}: {:?}", found.faults);
            let faulty: Vec<_> = found.faults.iter().map(|fault| fault.document).collect();
            let expected: Vec<_> = (document > 0).then_some(document).into_iter().collect();
            assert_eq!(faulty, expected, "{text:?}: {:?}", found.faults);
        }
    }
    assert_eq!(names("---not a marker: 1\n"), [""; 0]);
}

#[test]
fn a_fault_tells_the_line_in_the_file() {
    let text = format!("{}---\n# comment\na: b\nc: ]\n", account("a"));
    let (_, faults) = read(&text);
    assert_eq!(faults.len(), 1);
    assert!(faults[0].starts_with("document 2: line 8, column "), "{faults:?}");
    assert!(!faults[0].contains('\n'));

    let (_, faults) = read(format!("{}---\n{{\n  \"a\": 1,\n  \"b\" 2\n}}\n", account("a")));
    assert!(faults[0].starts_with("document 2: line 8, column "), "{faults:?}");
}

#[test]
fn a_fault_shows_nothing_of_a_secret() {
    let (_, faults) =
        read("apiVersion: v1\nkind: Secret\nstringData:\n  password: hunter2\n  other: 'hunter2\n");
    assert_eq!(faults.len(), 1);
    assert!(!faults[0].contains("hunter2"), "{faults:?}");
}

#[test]
fn aliases_and_merge_keys_are_followed() {
    let text = "
apiVersion: v1
kind: List
metadata: &shop {namespace: shop}
items:
- &first
  apiVersion: v1
  kind: ServiceAccount
  metadata: {<<: *shop, name: &name web}
- {apiVersion: v1, kind: Pod, metadata: *shop, spec: {serviceAccountName: *name}}
- <<: *first
  metadata: {name: other}
- *first
";
    assert_eq!(names(text), ["shop/web", "shop/web", "default/other", "shop/web"]);
    // An anchor ends with its document.
    let (_, faults) = read("a: &a 1\n---\nb: *a\n");
    assert_eq!(faults.len(), 1);
}

#[test]
fn many_aliases_of_one_anchor_are_no_bomb() {
    let mut text = "apiVersion: v1\nkind: List\nlabels: &l {app: x}\nitems:\n".to_owned();
    for i in 0..5_000 {
        text +=
            &format!("- {{apiVersion: v1, kind: ServiceAccount, metadata: {{name: a{i}, labels: *l}}}}\n");
    }
    assert_eq!(names(&text).len(), 5_000);
}

#[test]
fn a_bomb_of_aliases_is_refused_soon() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..12 {
        let nine = vec![format!("*a{}", i - 1); 10].join(", ");
        text += &format!("a{i}: &a{i} [{nine}]\n");
    }
    text += &format!("apiVersion: v1\nkind: List\nitems: *a11\n---\n{}", account("a"));
    let (accounts, faults) = read(&text);
    assert_eq!(accounts, ["default/a"]);
    assert_eq!(faults.len(), 1);
    assert!(faults[0].contains("alias"), "{faults:?}");
}

#[test]
fn depth_is_bounded() {
    for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", ""), ("{\"a\":", "}")] {
        for depth in [1_000, 1_000_000] {
            let text = format!("{}x{}\n---\n{}", open.repeat(depth), close.repeat(depth), account("a"));
            let (accounts, faults) = read(text);
            assert_eq!(accounts, ["default/a"], "{open}");
            assert_eq!(faults.len(), 1, "{open}");
        }
        let text = format!("{}1{}", open.repeat(60), close.repeat(60));
        assert_eq!(names(&text), [""; 0]);
    }
    let mut block = String::new();
    for depth in 0..2_000 {
        block += &format!("{}a:\n", " ".repeat(depth));
    }
    assert_eq!(read(block).1.len(), 1);
    let lists = 90;
    let list = "{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[".repeat(lists / 2);
    let text = format!(
        "{list}{{\"apiVersion\":\"v1\",\"kind\":\"ServiceAccount\",\"metadata\":{{\"name\":\"a\"}}}}{}",
        "]}".repeat(lists / 2)
    );
    assert_eq!(names(&text), ["default/a"]);
}

#[test]
fn json_of_every_shape() {
    let one = r#"{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"a","annotations":{"n":1e999,"big":123456789012345678901234567890,"u":"\ud83d\ude00","t":"a\tb"}}}"#;
    assert_eq!(names(one), ["default/a"]);
    assert_eq!(names(&format!("\t{one}\n\n{one}{one}\n")), ["default/a"; 3]);
    assert_eq!(
        names(
            "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"ServiceAccount\",\n\t\"metadata\": {\"name\": \"a\"}\n}\n"
        ),
        ["default/a"]
    );

    let (accounts, faults) = read(format!("{one}\n{{\"kind\": \n---\n{one}\n---\nkind: ["));
    assert_eq!(accounts, ["default/a"; 2]);
    assert_eq!(faults.len(), 2);
    assert!(faults[0].starts_with("document 2: line 3, "), "{faults:?}");
    assert!(faults[1].starts_with("document 4: "), "{faults:?}");
}

#[test]
fn repeated_keys_are_refused_only_where_a_name_would_be_in_doubt() {
    for twice in ["kind: Pod", "metadata: {name: b}", "apiVersion: v1"] {
        let (accounts, faults) = read(format!("{}{twice}\n", account("a")));
        assert_eq!(accounts, [""; 0]);
        assert!(faults[0].contains("duplicate"), "{faults:?}");
    }
    let (accounts, faults) =
        read(r#"{"apiVersion":"v1","kind":"Pod","kind":"ServiceAccount","metadata":{"name":"a"}}"#);
    assert_eq!((accounts.len(), faults.len()), (0, 1));
    assert_eq!(names(&format!("{}data: {{x: 1, x: 2}}\n", account("a"))), ["default/a"]);
}

#[test]
fn odd_values_elsewhere_do_no_harm() {
    let odd = "data:
  number: 1e999
  nan: .nan
  hex: 0x7fffffffffffffffffffffffffffffffffff
  binary: !!binary /w==
  custom: !Custom {a: 1}
  tagged: !Ref text
  ? [complex, key]
  : value
  1: number
  ~: null
  text: |
    ---
     x: [
  folded: >-
    {{ template }}
";
    assert_eq!(names(&format!("{}{odd}", account("a"))), ["default/a"]);
}

#[test]
fn text_that_is_no_utf_8_costs_its_own_document() {
    let mut text = account("a").into_bytes();
    text.extend(b"---\na: b\nx: \xff\n---\n");
    text.extend(account("b").bytes());
    let (accounts, faults) = read(text);
    assert_eq!(accounts, ["default/a", "default/b"]);
    assert_eq!(faults, ["document 2: line 7, column 4: this is no UTF-8 text"]);
    let (_, faults) = read(b"\xff\xfea\0");
    assert_eq!(faults, ["document 1: the text is UTF-16; save it as UTF-8"]);
    assert_eq!(read([0; 100]).1.len(), 1);
}

#[test]
fn more_faults_than_anyone_reads_are_counted() {
    let text = "---\n[\n".repeat(1_000) + "---\n" + &account("a");
    let found = accounts_in(text.as_bytes());
    assert_eq!(found.accounts.len(), 1);
    assert_eq!(found.faults.len(), MAX_FAULTS + 1);
    assert_eq!(found.faults[MAX_FAULTS].reason, "900 more faults up to here");
}

#[test]
fn a_text_cut_anywhere_is_read_without_panic_and_keeps_whole_documents() {
    let text = format!(
        "---\n{}---\n{{\"apiVersion\":\"v1\",\"kind\":\"ServiceAccount\",\"metadata\":{{\"name\":\"ü\"}}}}\n---\nx: &a ['é', *a]\n",
        account("first")
    );
    let whole = text.find("---\n{").unwrap() + 3;
    for end in 0..text.len() {
        let found = accounts_in(&text.as_bytes()[..end]);
        if end >= whole {
            assert_eq!(found.accounts[0].name(), "first");
        }
    }
}

proptest::proptest! {
    #[test]
    fn nothing_makes_it_panic(text in "(---|\\.\\.\\.|[a-z&*!|>%@`\"'{}\\[\\],:?#~ \n\r\t-]){0,60}") {
        accounts_in(text.as_bytes());
    }

    #[test]
    fn no_bytes_make_it_panic(text in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        accounts_in(&text);
    }

    #[test]
    fn a_bad_document_disturbs_no_other(
        bad in "[a-z&*!|>@\"'{}\\[\\],:?#~ \n-]{0,40}",
        before in 0..3usize,
        after in 0..3usize,
    ) {
        let text = format!(
            "{}---\n{}\n{}",
            format!("---\n{}", account("a")).repeat(before),
            bad.replace("---", "--"),
            format!("---\n{}", account("b")).repeat(after),
        );
        let found = accounts_in(text.as_bytes());
        let named = |name| found.accounts.iter().filter(|account| account.name() == name).count();
        proptest::prop_assert_eq!(named("a"), before);
        proptest::prop_assert_eq!(named("b"), after);
    }
}
