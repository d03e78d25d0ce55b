//! The loop over a sink that fails, waits and is changed as a test says.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;

use super::*;
use crate::core::bundle::TrustBundle;
use crate::core::certificate::Certificate;
use crate::core::issuer::{self, Issuer};
use crate::core::plan::{CertificateSet, Good};
use crate::core::profile::Profile;
use crate::sink::{Error, Found, FoundSet};
use crate::sys::keys;

/// Places that are maps.
#[derive(Default)]
struct Places {
    sets: Mutex<HashMap<ServiceAccount, CertificateSet>>,
    reads: Mutex<Vec<ServiceAccount>>,
    writes: Mutex<Vec<ServiceAccount>>,
    failing: Mutex<HashSet<ServiceAccount>>,
    stuck: Mutex<HashSet<ServiceAccount>>,
    under_way: Mutex<(usize, usize)>,
}

impl Places {
    fn written(&self) -> Vec<ServiceAccount> {
        self.writes.lock().unwrap().clone()
    }

    async fn write(&self, account: &ServiceAccount) -> Result<(), Error> {
        {
            let mut under_way = self.under_way.lock().unwrap();
            under_way.0 += 1;
            under_way.1 = under_way.1.max(under_way.0);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        if self.stuck.lock().unwrap().contains(account) {
            std::future::pending::<()>().await;
        }
        self.under_way.lock().unwrap().0 -= 1;
        self.writes.lock().unwrap().push(account.clone());
        match self.failing.lock().unwrap().contains(account) {
            true => Err(Error::Api { doing: "writing", fault: "no".to_owned() }),
            false => Ok(()),
        }
    }
}

impl Sink for Places {
    const AT_ONCE: usize = 4;
    const TOGETHER: usize = 1;
    const TELLS: bool = true;

    fn recorded(&self) -> Vec<ServiceAccount> {
        Vec::new()
    }

    async fn read(&self, account: &ServiceAccount) -> Result<Found, Error> {
        self.reads.lock().unwrap().push(account.clone());
        Ok(match self.sets.lock().unwrap().get(account) {
            Some(set) => Found::Set(FoundSet { set: set.clone(), loose: None, marked: true }),
            None => Found::Absent,
        })
    }

    async fn publish(&self, account: &ServiceAccount, set: &CertificateSet) -> Result<(), Error> {
        self.write(account).await?;
        self.sets.lock().unwrap().insert(account.clone(), set.clone());
        Ok(())
    }

    async fn remove(&self, account: &ServiceAccount) -> Result<(), Error> {
        self.write(account).await?;
        self.sets.lock().unwrap().remove(account);
        Ok(())
    }
}

/// A loop that runs until this is dropped.
struct Running {
    places: Arc<Places>,
    events: mpsc::Sender<Event>,
    first: Option<oneshot::Receiver<Report>>,
    _stop: watch::Sender<bool>,
    _task: JoinSet<()>,
}

impl Running {
    fn start() -> Self {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let (organization, domain) = ("Example".parse().unwrap(), "cluster.local".parse().unwrap());
        let profile = Profile::Root { organization: &organization, trust_domain: &domain };
        let lifetime = Lifetime::from_secs(86_400 * 365);
        let root =
            issuer::root(&key, &profile, lifetime, clock::now(), keys::serial_number().unwrap()).unwrap();
        let root = Certificate::from_der(root.der()).unwrap();
        let bundle = TrustBundle::new([root.clone()]).unwrap();
        let issuer = Issuer::new(Arc::new(key), &[root], bundle, &domain).unwrap();
        let authority = Arc::new(Authority::new(domain, issuer));
        let places = Arc::new(Places::default());
        let options = Options::fixed(Lifetime::from_secs(86_400), KeyKind::P256);
        let (stop, stopped) = watch::channel(false);
        let reconciler = Reconciler::new(
            authority,
            places.clone(),
            options,
            Metrics::default(),
            stopped,
            Box::new(|_, _| {}),
        );
        let (events, inbox) = mpsc::channel(64);
        let (passed, first) = oneshot::channel();
        let mut task = JoinSet::new();
        task.spawn(reconciler.run(inbox, passed));
        Self { places, events, first: Some(first), _stop: stop, _task: task }
    }

    async fn tell(&self, event: Event) {
        self.events.send(event).await.unwrap();
    }

    async fn add(&self, accounts: &[ServiceAccount]) {
        self.tell(Event::Source(Change { added: accounts.to_vec(), removed: Vec::new(), settled: true }))
            .await;
    }

    async fn listed(&self) {
        self.tell(Event::Listing).await;
        self.tell(Event::Listed).await;
    }

    async fn first(&mut self) -> Report {
        tokio::time::timeout(Duration::from_secs(60), self.first.take().unwrap()).await.unwrap().unwrap()
    }

    /// Lets so much time pass.
    async fn pass(&self, seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
}

fn accounts(count: usize) -> Vec<ServiceAccount> {
    (0..count).map(|n| ServiceAccount::new("shop", &format!("a-{n:03}")).unwrap()).collect()
}

#[tokio::test]
async fn one_that_is_stuck_holds_up_no_other_and_there_is_a_bound() {
    let running = Running::start();
    let all = accounts(20);
    running.places.stuck.lock().unwrap().insert(all[3].clone());
    running.add(&all).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(running.places.written(), [], "before it is known what is there");
    running.listed().await;
    tokio::time::timeout(Duration::from_secs(10), async {
        while running.places.written().len() < 19 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(running.places.under_way.lock().unwrap().1, Places::AT_ONCE);
    // News meanwhile are taken.
    running.add(&[ServiceAccount::new("shop", "late").unwrap()]).await;
    tokio::time::timeout(Duration::from_secs(10), async {
        while running.places.written().len() < 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn what_was_told_of_is_not_written_and_what_nobody_has_is_removed() {
    let mut running = Running::start();
    let all = accounts(3);
    let at = clock::now() + Duration::from_secs(3_600);
    let good = Observed::Good(Good { renew_at: at, not_after: at });
    running.add(&all[..2]).await;
    running.tell(Event::Listing).await;
    running.tell(Event::Seen(all[0].clone(), good.clone())).await;
    running.tell(Event::Seen(all[2].clone(), good.clone())).await;
    running.tell(Event::Listed).await;
    let report = running.first().await;
    assert_eq!((report.good, report.issued, report.removed, report.waiting), (2, 1, 1, 0));
    let mut written = running.places.written();
    written.sort();
    assert_eq!(written, all[1..]);
    // The next list has one less, and one more that nobody wants.
    running.tell(Event::Listing).await;
    running.tell(Event::Seen(all[1].clone(), good.clone())).await;
    running.tell(Event::Seen(all[2].clone(), good)).await;
    running.tell(Event::Listed).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut written = running.places.written().split_off(2);
    written.sort();
    assert_eq!(written, [all[0].clone(), all[2].clone()]);
}

#[tokio::test]
async fn what_is_not_there_is_not_read_however_often_it_is_asked_for() {
    let mut running = Running::start();
    let all = accounts(3);
    running.add(&all).await;
    running.add(&all).await;
    running.listed().await;
    assert_eq!(running.first().await.issued, 3);
    assert_eq!(*running.places.reads.lock().unwrap(), []);
}

#[tokio::test]
async fn another_account_of_the_same_name_is_looked_at() {
    let mut running = Running::start();
    let all = accounts(1);
    running.add(&all).await;
    running.listed().await;
    running.first().await;
    running.places.sets.lock().unwrap().clear();
    running.add(&all).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(running.places.written().len(), 2);
}

#[tokio::test]
async fn what_is_undone_again_and_again_is_given_up_for_a_while() {
    let mut running = Running::start();
    let all = accounts(1);
    running.add(&all).await;
    running.listed().await;
    running.first().await;
    for _ in 0..REPAIRS + 10 {
        running.tell(Event::Seen(all[0].clone(), Observed::Bad("edited".to_owned()))).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(running.places.written().len(), 1 + usize::from(REPAIRS));
    running.pass(3).await;
    assert_eq!(running.places.written().len(), 2 + usize::from(REPAIRS));
}

#[tokio::test]
async fn failures_are_tried_again_later_and_later_and_at_times_of_their_own() {
    let mut running = Running::start();
    let all = accounts(50);
    running.places.failing.lock().unwrap().extend(all.iter().cloned());
    running.add(&all).await;
    running.listed().await;
    let report = running.first().await;
    assert_eq!((report.waiting, report.good), (50, 0));
    running.pass(4).await;
    let written = running.places.written().len();
    // The first attempt, one after half a second to one, one after one to two more, and some the next.
    assert!((150..=250).contains(&written), "{written}");
    running.places.failing.lock().unwrap().clear();
    running.pass(5).await;
    assert_eq!(running.places.sets.lock().unwrap().len(), 50);
}

#[test]
fn retries_spread() {
    let waits: Vec<_> =
        accounts(200).iter().map(|account| jittered(Duration::from_secs(60), account, 7)).collect();
    assert!(waits.iter().all(|wait| (30..=60).contains(&wait.as_secs())), "{waits:?}");
    for from in (30..60).step_by(10) {
        let some = waits.iter().filter(|wait| (from..from + 10).contains(&wait.as_secs())).count();
        assert!((40..100).contains(&some), "{from} {some}");
    }
}
