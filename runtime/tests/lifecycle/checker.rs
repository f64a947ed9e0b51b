//! Walks every state that a lifecycle can come to, the nearest first, and says how one that breaks a property came about.
//!
//! The states are some hundred thousand, so that this is all the model checker that is needed. The libraries for it bring a
//! server, and features of shared dependencies by which all that is tested would be built twice.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::model::{Action, Lifecycle, Property, World};

/// What was found.
#[derive(Debug)]
pub struct Findings {
    pub states: usize,
    /// The properties that do not hold, each with a shortest way to a state where it does not.
    pub broken: BTreeMap<Property, Counterexample>,
}

/// What happens, from which beginning, until a property is broken.
#[derive(Debug)]
pub struct Counterexample {
    pub begin: World,
    pub actions: Vec<Action>,
    pub end: World,
}

/// How a state was come to first: from which other, by what.
type Origin = Option<(usize, Action)>;

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            begin,
            actions,
            end,
        } = self;
        write!(f, "from {begin:?}\nby {actions:?}\nto {end:?}")
    }
}

/// Walks all states, or until `wanted` is broken.
pub fn explore(lifecycle: Lifecycle, begin: Vec<World>, wanted: Option<Property>) -> Findings {
    let mut known: HashMap<World, usize> = HashMap::new();
    let mut states: Vec<(World, Origin)> = Vec::new();
    let mut reach = |states: &mut Vec<(World, Origin)>, world: World, origin| {
        known.entry(world).or_insert_with_key(|world| {
            states.push((world.clone(), origin));
            states.len() - 1
        });
    };
    for world in begin {
        reach(&mut states, world, None);
    }
    let mut broken = BTreeMap::new();
    let mut at = 0;
    while at < states.len() && !wanted.is_some_and(|wanted| broken.contains_key(&wanted)) {
        let world = states[at].0.clone();
        let next = lifecycle.next_states(&world);
        for property in Property::ALL {
            if !lifecycle.holds(property, &world, next.is_empty()) {
                broken
                    .entry(property)
                    .or_insert_with(|| counterexample(&states, at));
            }
        }
        for (action, world) in next {
            reach(&mut states, world, Some((at, action)));
        }
        at += 1;
    }
    Findings {
        states: states.len(),
        broken,
    }
}

fn counterexample(states: &[(World, Origin)], end: usize) -> Counterexample {
    let mut actions = Vec::new();
    let mut at = end;
    while let Some((from, action)) = states[at].1 {
        actions.push(action);
        at = from;
    }
    actions.reverse();
    Counterexample {
        begin: states[at].0.clone(),
        actions,
        end: states[end].0.clone(),
    }
}
