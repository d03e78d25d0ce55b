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
    places: Semaphore,
    asked: Mutex<HashMap<Question, Arc<Asked>>>,
}

impl Live {
    pub(super) fn new(client: Client) -> Self {
        Self { client, places: Semaphore::new(PLACES), asked: Mutex::default() }
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
            (Instant::now(), found.await.unwrap_or_else(late))
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
