//! `update`: other limits for a container that lives.
//!
//! Limits depend on each other (a quota on its period, swap on memory), so a change is applied together with what was
//! given for the same controller before, and written down for the next one.

use engine::fault;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::{Error, Lifecycle};
use crate::bundle;
use crate::id::ContainerId;
use crate::isolation::Model;
use crate::state::SAVED_CONFIG;

impl Lifecycle {
    /// Changes the resource limits of a container that lives. What is not given stays, and so do the rules for devices,
    /// which clients send along as they were.
    ///
    /// # Errors
    /// It does not live, or a limit could not be set.
    pub fn update(&self, id: &ContainerId, changes: &LinuxResources) -> Result<(), Error> {
        let container = self.store.lock(id)?;
        if container.record().live_pid().is_none() {
            return Err(Error::Status {
                problem: "container not running",
                id: id.clone(),
            });
        }
        let encode = |source| Error::Encode {
            what: "the resources",
            source,
        };
        let mut config = bundle::load_json(&container.dir().join(SAVED_CONFIG))?;
        let changes = serde_json::to_value(changes).map_err(encode)?;
        let applied = merge(&mut config, &changes);
        let applied: LinuxResources = serde_json::from_value(applied).map_err(encode)?;
        let isolation = container.record().isolation.isolation();
        if let Some(scope) = &container.record().scope
            && container.record().isolation == Model::Container
        {
            scope.update(&applied)?;
        }
        isolation.update(&self.target(container.record(), container.dir()), &applied)?;
        fault::point("update.applied");
        let config = serde_json::to_vec(&config).map_err(encode)?;
        Ok(container.write(SAVED_CONFIG, &config)?)
    }
}

/// Merges changes into `linux.resources` of a configuration, and returns the parts that changed, each as a whole.
fn merge(config: &mut Value, changes: &Value) -> Value {
    let mut applied = Map::new();
    let mut changes = changes.as_object().cloned().unwrap_or_default();
    changes.remove("devices");
    // No limit of memory is no limit of memory and swap, as it is with version 1 anyway.
    if let Some(memory) = changes.get_mut("memory").and_then(Value::as_object_mut)
        && memory.get("limit") == Some(&json!(-1))
    {
        memory.entry("swap").or_insert(json!(-1));
    }
    for (controller, change) in changes {
        let Some(linux) = config.get_mut("linux").and_then(Value::as_object_mut) else {
            continue;
        };
        let resources = linux.entry("resources").or_insert_with(|| json!({}));
        let change = match change {
            Value::Object(fields) => {
                let given: Map<_, _> = fields.into_iter().filter(is_given).collect();
                if given.is_empty() {
                    continue;
                }
                let mut whole = resources
                    .get(&controller)
                    .and_then(Value::as_object)
                    .cloned()
                    .unwrap_or_default();
                whole.extend(given);
                Value::Object(whole)
            }
            Value::Null => continue,
            other => other,
        };
        if let Some(resources) = resources.as_object_mut() {
            resources.insert(controller.clone(), change.clone());
        }
        applied.insert(controller, change);
    }
    Value::Object(applied)
}

/// Clients in Go write 0 and nothing for what they do not give, but for the two fields where 0 is a value.
fn is_given((name, value): &(String, Value)) -> bool {
    let is_nothing = value.is_null() || *value == json!(0) || *value == json!("");
    !is_nothing || (*value == json!(0) && matches!(name.as_str(), "idle" | "burst"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_applied_with_its_neighbours_and_remembered() {
        let mut config = json!({"linux": {"resources": {
            "cpu": {"quota": 50_000, "period": 100_000},
            "memory": {"limit": 1024, "swap": 2048},
        }}});
        let changes = json!({
            "cpu": {"quota": 20_000, "period": 0, "idle": 0},
            "memory": {"limit": 0},
            "pids": {"limit": 0},
            "devices": [{"allow": false}],
        });
        let applied = merge(&mut config, &changes);
        let cpu = json!({"quota": 20_000, "period": 100_000, "idle": 0});
        assert_eq!(applied, json!({ "cpu": cpu }));
        let resources = &config["linux"]["resources"];
        assert_eq!(resources["cpu"], cpu);
        assert_eq!(resources["memory"]["limit"], 1024);
        assert!(resources.get("pids").is_none() && resources.get("devices").is_none());
    }

    #[test]
    fn memory_without_a_limit_is_swap_without_one() {
        let mut config = json!({"linux": {}});
        let applied = merge(&mut config, &json!({"memory": {"limit": -1}}));
        assert_eq!(applied, json!({"memory": {"limit": -1, "swap": -1}}));
        let applied = merge(&mut config, &json!({"memory": {"limit": -1, "swap": 7}}));
        assert_eq!(applied["memory"]["swap"], 7);
    }
}
