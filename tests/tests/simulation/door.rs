//! Between pretended workers: a door at which each is reached, a ring that gathers who has summed
//! which slots, and answers to joiners, which bring along the votes on what is fetched. Like the real
//! ones, a ring has no time-out of its own once it stands, breaks when a neighbour's connection does, and
//! turns connections of older rings away.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use looptrain_proto::v1::Prepared;
use looptrain_proto::v1::failed::Cause;
use looptrain_proto::{Digest, Step};
use looptrain_worker::parts::{Failure, Membership, Memory};
use looptrain_worker::reduce::tcp::{Peer, RingId};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use turmoil::net::TcpListener;

use crate::network::{Wire, receive, send};
use crate::shared::Shared;

pub(crate) const PEER_PORT: u16 = 7000;

/// As long as the real ring takes to give up forming.
const FORM_TIME: Duration = Duration::from_secs(30);
/// As long as a real joiner waits for what was to be offered.
const OFFER_TIME: Duration = Duration::from_secs(10);
const CONNECT_TIME: Duration = Duration::from_secs(5);
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// First words of a connection.
const FOR_A_RING: u64 = 0;
const FOR_THE_STATE: u64 = 1;
const FOR_AN_UPDATE: u64 = 2;

/// First words of an answer to a joiner.
const NOT_YET: u64 = 0;
const GONE: u64 = 1;
const HERE: u64 = 2;

/// What a member offers to joiners: the weights after a step, and the gradients of the steps since.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) step: Step,
    pub(crate) weights: Digest,
    pub(crate) updates: BTreeMap<Step, Digest>,
    /// Nobody fetches the weights any more.
    pub(crate) only_updates: bool,
}

pub(crate) type Shelf = Arc<Mutex<Option<Offer>>>;

/// What a member gives of its offer: the weights, or the gradient, and its votes on the steps that led there.
pub(crate) struct Given {
    pub(crate) digest: Digest,
    pub(crate) votes: Vec<CastVote>,
}

/// A vote, as far as it differs from others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CastVote {
    pub(crate) step: u64,
    pub(crate) generation: u64,
    pub(crate) digest: Digest,
}

const DIGEST_WORDS: usize = 4;
const VOTE_WORDS: usize = 2 + DIGEST_WORDS;

impl Given {
    fn to_words(&self) -> Vec<u64> {
        let mut words = digest_words(&self.digest);
        for vote in &self.votes {
            words.extend([vote.step, vote.generation]);
            words.extend(digest_words(&vote.digest));
        }
        words
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let (digest, votes) = words.split_at_checked(DIGEST_WORDS)?;
        let vote = |words: &[u64]| {
            let [step, generation, digest @ ..] = words else { return None };
            let digest = digest_of_words(digest)?;
            Some(CastVote { step: *step, generation: *generation, digest })
        };
        let votes = votes.chunks(VOTE_WORDS).map(vote).collect::<Option<_>>()?;
        Some(Self { digest: digest_of_words(digest)?, votes })
    }
}

fn digest_words(digest: &Digest) -> Vec<u64> {
    let word = |bytes: &[u8]| {
        u64::from_le_bytes(bytes.try_into().expect("a digest is four times eight bytes"))
    };
    digest.0.chunks(8).map(word).collect()
}

fn digest_of_words(words: &[u64]) -> Option<Digest> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Digest::from_bytes(&bytes).ok()
}

/// Who waits at the door, by ring.
#[derive(Debug, Default)]
struct Hall {
    waiting: Mutex<BTreeMap<RingId, Wire>>,
    came: Notify,
}

impl Hall {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<RingId, Wire>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts peers; closed when it is dropped.
pub(crate) struct Door {
    host: &'static str,
    shared: Arc<Shared>,
    hall: Arc<Hall>,
    _doorman: JoinSet<()>,
}

impl Door {
    pub(crate) async fn open(
        host: &'static str,
        shared: Arc<Shared>,
        shelf: Shelf,
        memory: Memory,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PEER_PORT)).await?;
        let hall = Arc::new(Hall::default());
        let mut doorman = JoinSet::new();
        doorman.spawn(keep(listener, host, Arc::clone(&shared), Arc::clone(&hall), shelf, memory));
        Ok(Self { host, shared, hall, _doorman: doorman })
    }

    /// Connects to the rank after this one and waits for the one before it.
    pub(crate) async fn form(&self, membership: &Membership) -> Result<Ring, Failure> {
        let Membership { ring, rank, members, .. } = membership;
        let (world, rank) = (members.len(), rank.0 as usize);
        // Whoever comes for an older ring comes in vain.
        self.hall.waiting().retain(|waiting, _| waiting >= ring);
        if world == 1 {
            return Ok(Ring { world, next: None, previous: None });
        }
        let (next, previous) = (&members[(rank + 1) % world], &members[(rank + world - 1) % world]);
        let deadline = Instant::now() + FORM_TIME;
        let dialled = async {
            loop {
                let hello = [FOR_A_RING, ring.incarnation.0, ring.generation.0];
                match timeout_at(deadline, self.connect(next, &hello)).await {
                    Ok(Ok(stream)) => return Ok(stream),
                    Ok(Err(_)) => sleep(ASK_AGAIN).await,
                    Err(_) => return Err(lost(next, "it does not answer")),
                }
            }
        };
        let came = async {
            loop {
                let notified = self.hall.came.notified();
                if let Some(stream) = self.hall.waiting().remove(ring) {
                    return Ok(stream);
                }
                if timeout_at(deadline, notified).await.is_err() {
                    return Err(lost(previous, "it did not connect"));
                }
            }
        };
        let (next, previous) = tokio::try_join!(biased; dialled, came)?;
        Ok(Ring { world, next: Some(next), previous: Some(previous) })
    }

    async fn connect(&self, peer: &Peer, hello: &[u64]) -> io::Result<Wire> {
        let wire = Wire::connect(&self.shared, self.host, peer.address.as_str());
        let mut wire = timeout(CONNECT_TIME, wire).await??;
        send(&mut wire, hello).await?;
        Ok(wire)
    }

    /// Asks members for the weights after a step, or for the gradient that leads to it. `None` when some
    /// may come to have it, and none has it yet.
    pub(crate) async fn ask(
        &self,
        sources: &[Peer],
        update: bool,
        step: Step,
        patience: bool,
    ) -> Result<Option<Given>, String> {
        let what = if update { FOR_AN_UPDATE } else { FOR_THE_STATE };
        let deadline = Instant::now() + if patience { OFFER_TIME } else { Duration::ZERO };
        loop {
            let (mut reasons, mut may_come) = (Vec::new(), false);
            for peer in sources {
                let asked = async {
                    let mut stream = self.connect(peer, &[what, step.0]).await?;
                    timeout(CONNECT_TIME, receive(&mut stream)).await?
                };
                match asked.await.as_deref() {
                    Ok([HERE, words @ ..]) => {
                        let damaged = || format!("{peer} gives {words:?}");
                        return Given::from_words(words).map(Some).ok_or_else(damaged);
                    }
                    Ok([NOT_YET]) => may_come = true,
                    Ok(_) => reasons.push(format!("{peer}: it does not have it any more")),
                    Err(error) => reasons.push(format!("{peer}: {error}")),
                }
            }
            if !may_come {
                let reasons = reasons.join("; ");
                return Err(format!("no peer has step {step}: {reasons}"));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            sleep(ASK_AGAIN).await;
        }
    }
}

fn lost(peer: &Peer, what: &str) -> Failure {
    Failure::Told(Cause::Peer, format!("lost {peer}: {what}"))
}

async fn keep(
    listener: TcpListener,
    host: &'static str,
    shared: Arc<Shared>,
    hall: Arc<Hall>,
    shelf: Shelf,
    memory: Memory,
) {
    let mut guests = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let mut stream = Wire::over(stream, &shared, host);
        while guests.try_join_next().is_some() {}
        let (hall, shelf, memory) = (Arc::clone(&hall), Arc::clone(&shelf), memory.clone());
        guests.spawn(async move {
            let Ok(Ok(words)) = timeout(FORM_TIME, receive(&mut stream)).await else { return };
            match words[..] {
                [FOR_A_RING, incarnation, generation] => {
                    let ring = RingId {
                        incarnation: looptrain_proto::Incarnation(incarnation),
                        generation: looptrain_proto::Generation(generation),
                    };
                    hall.waiting().insert(ring, stream);
                    hall.came.notify_one();
                }
                // Whoever does not read the answer asks again, or somebody else.
                [what, step] => {
                    let _ = send(&mut stream, &answer(&shelf, &memory, what, Step(step))).await;
                    // Until the other side has it.
                    let _ = timeout(FORM_TIME, receive(&mut stream)).await;
                }
                _ => {}
            }
        });
    }
}

fn answer(shelf: &Shelf, memory: &Memory, what: u64, step: Step) -> Vec<u64> {
    let offer = shelf.lock().unwrap_or_else(PoisonError::into_inner);
    let cast = |vote: Prepared| {
        let digest = Digest::from_bytes(&vote.digest).expect("a vote has a digest");
        CastVote { step: vote.step, generation: vote.generation, digest }
    };
    let here = |digest: Digest| {
        let first = if what == FOR_THE_STATE { Step(1) } else { step };
        let votes = memory.votes(first..=step).into_iter().map(cast).collect();
        let given = Given { digest, votes };
        [HERE].into_iter().chain(given.to_words()).collect()
    };
    match (what, offer.as_ref()) {
        (FOR_THE_STATE, None) => vec![NOT_YET],
        (FOR_THE_STATE, Some(offer)) if step == offer.step && !offer.only_updates => {
            here(offer.weights)
        }
        (FOR_THE_STATE, Some(offer)) if step > offer.step => vec![NOT_YET],
        (FOR_AN_UPDATE, Some(offer)) => match offer.updates.get(&step) {
            Some(digest) => here(*digest),
            None if step > offer.step => vec![NOT_YET],
            None => vec![GONE],
        },
        _ => vec![GONE],
    }
}

/// The pretended all-reduce: everybody's contribution goes once around.
#[derive(Debug)]
pub(crate) struct Ring {
    world: usize,
    next: Option<Wire>,
    previous: Option<Wire>,
}

impl Ring {
    /// The slots that all ranks together have put in, each as often as it was.
    pub(crate) async fn all_reduce(
        &mut self,
        step: Step,
        own: &[u64],
    ) -> Result<Vec<u64>, Failure> {
        let mut sum = own.to_vec();
        let (Some(next), Some(previous)) = (&mut self.next, &mut self.previous) else {
            return Ok(sum);
        };
        let broken = |error: io::Error| Failure::Told(Cause::Peer, format!("lost a peer: {error}"));
        let mut passing: Vec<u64> = [step.0].iter().chain(own).copied().collect();
        for _ in 1..self.world {
            let ((), received) = tokio::try_join!(biased; send(next, &passing), receive(previous))
                .map_err(broken)?;
            match received.split_first() {
                Some((theirs, slots)) if *theirs == step.0 => sum.extend(slots),
                theirs => {
                    let detail = format!("a peer reduces {theirs:?} instead of step {step}");
                    return Err(Failure::Told(Cause::Peer, detail));
                }
            }
            passing = received;
        }
        Ok(sum)
    }
}
