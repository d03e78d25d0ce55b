//! Single reads, for what the watches do not tell, or not yet: few at a time, each with an end, one for all who ask the
//! same, and none for what was asked a moment ago.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1;
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::Instant;

use super::known::Facts;
use super::metrics::Metrics;
use super::seen::Seen;
use super::{PATIENCE, said};
use crate::core::spiffe::ServiceAccount;
use crate::sys::clock;

/// So many reads at once.
const PLACES: usize = 16;
/// So many questions at once, those that wait and those that were answered a moment ago.
const QUESTIONS: usize = 4096;
/// What was answered is not asked again for so long.
const MOMENT: Duration = Duration::from_secs(1);

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Question {
    Account(ServiceAccount),
    Pod {
        namespace: Box<str>,
        name: Box<str>,
    },
    Node(Box<str>),
    /// Any pod of the account on the node that has neither failed nor succeeded.
    Runs {
        node: Box<str>,
        account: ServiceAccount,
    },
}

/// An object, or that there is none; an error says why that cannot be known.
pub(super) type Found = Result<Option<Facts>, String>;

/// Filled once there is an answer, with when that was.
type Asked = OnceCell<(Instant, Found)>;

/// Asks the API server.
pub(super) struct Live {
    client: Client,
    metrics: Metrics,
    places: Semaphore,
    asked: Mutex<HashMap<Question, Arc<Asked>>>,
}

impl Live {
    pub(super) fn new(client: Client, metrics: Metrics) -> Self {
        Self { client, metrics, places: Semaphore::new(PLACES), asked: Mutex::default() }
    }

    pub(super) async fn ask(&self, question: Question) -> Found {
        let cell = self.cell(&question)?;
        // If the one who asks goes away, the next in the row asks.
        let answered = cell.get_or_init(|| async {
            let found = tokio::time::timeout(PATIENCE, async {
                let _place = self.places.acquire().await;
                self.read(&question).await.map_err(|fault| said(&fault))
            });
            let late = |_| Err(format!("no answer within {} seconds", PATIENCE.as_secs()));
            let found = found.await.unwrap_or_else(late);
            self.metrics.read(&found);
            (Instant::now(), found)
        });
        answered.await.1.clone()
    }

    fn cell(&self, question: &Question) -> Result<Arc<Asked>, String> {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let is_fresh = |cell: &Arc<Asked>| match cell.get() {
            Some((at, _)) => now - *at < MOMENT,
            None => Arc::strong_count(cell) > 1,
        };
        if let Some(cell) = asked.get(question)
            && is_fresh(cell)
        {
            return Ok(cell.clone());
        }
        if asked.len() >= QUESTIONS {
            asked.retain(|_, cell| is_fresh(cell));
            if asked.len() >= QUESTIONS {
                return Err("too many questions wait for the API server".to_owned());
            }
        }
        let cell = Arc::new(OnceCell::new());
        asked.insert(question.clone(), cell.clone());
        Ok(cell)
    }

    async fn read(&self, question: &Question) -> kube::Result<Option<Facts>> {
        let client = self.client.clone();
        Ok(match question {
            Question::Account(account) => {
                let accounts: Api<Seen<v1::ServiceAccount>> = Api::namespaced(client, account.namespace());
                accounts.get_opt(account.name()).await?.map(|seen| Facts::of(&seen))
            }
            Question::Pod { namespace, name } => {
                let pods: Api<Seen<v1::Pod>> = Api::namespaced(client, namespace);
                pods.get_opt(name).await?.map(|seen| Facts::of(&seen))
            }
            Question::Node(name) => {
                let nodes: Api<Seen<v1::Node>> = Api::all(client);
                nodes.get_opt(name).await?.map(|seen| Facts::of(&seen))
            }
            Question::Runs { node, account } => {
                let pods: Api<Seen<v1::Pod>> = Api::namespaced(client, account.namespace());
                let chosen = format!(
                    "spec.nodeName={node},spec.serviceAccountName={},status.phase!=Failed,status.phase!=Succeeded",
                    account.name()
                );
                let now = clock::now().unix_timestamp();
                let found = pods.list(&ListParams::default().fields(&chosen).limit(50)).await?;
                found.items.iter().map(Facts::of).find(|facts| {
                    facts.runs(now)
                        && facts.node.as_deref() == Some(&**node)
                        && facts.account.as_ref() == Some(account)
                })
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::Router;
    use axum::http::StatusCode;
    use tokio::task::JoinSet;

    use super::*;
    use crate::cluster::Cluster;

    /// Asks an API server that has nothing, takes a while to say so, and counts how often it is asked.
    async fn live(tasks: &mut JoinSet<()>) -> (Arc<Live>, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        let nothing = move || {
            counted.fetch_add(1, Ordering::SeqCst);
            async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let status = r#"{"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}"#;
                (StatusCode::NOT_FOUND, status)
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tasks.spawn(async move { axum::serve(listener, Router::new().fallback(nothing)).await.unwrap() });
        let cluster = Cluster::new(kube::Config::new(url.parse().unwrap())).unwrap();
        (Arc::new(Live::new(cluster.client.clone(), Metrics::default())), count)
    }

    fn question(n: usize) -> Question {
        Question::Account(ServiceAccount::new("shop", &format!("a{n}")).unwrap())
    }

    #[tokio::test]
    async fn what_was_asked_a_moment_ago_is_not_asked_again() {
        let mut tasks = JoinSet::new();
        let (live, count) = live(&mut tasks).await;
        let mut asking = JoinSet::new();
        for n in 0..100 {
            let live = live.clone();
            asking.spawn(async move { live.ask(question(n % 2)).await });
        }
        for found in asking.join_all().await {
            assert_eq!(found, Ok(None));
        }
        assert_eq!(live.ask(question(0)).await, Ok(None));
        assert_eq!(count.load(Ordering::SeqCst), 2);
        tokio::time::sleep(MOMENT).await;
        assert_eq!(live.ask(question(0)).await, Ok(None));
        assert_eq!(count.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn who_goes_away_before_the_answer_leaves_the_question_to_the_next() {
        let mut tasks = JoinSet::new();
        let (live, count) = live(&mut tasks).await;
        let mut asking = Box::pin(live.ask(question(0)));
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut asking).await.is_err());
        drop(asking);
        assert_eq!(live.ask(question(0)).await, Ok(None));
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn questions_have_an_end_and_those_of_before_make_room() {
        let mut tasks = JoinSet::new();
        let (live, _) = live(&mut tasks).await;
        let cells: Vec<_> = (0..QUESTIONS).map(|n| live.cell(&question(n)).unwrap()).collect();
        assert!(live.ask(question(QUESTIONS)).await.unwrap_err().contains("too many"));
        drop(cells);
        assert_eq!(live.ask(question(QUESTIONS)).await, Ok(None));
        assert_eq!(live.asked.lock().unwrap().len(), 1);
    }
}
