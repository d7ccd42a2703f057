//! Merges a user's `spec.podTemplate` into the operator's pod template. It owns what may be set and how lists are
//! merged, and names each mistake by its path; it knows nothing of what the operator's template holds.

use k8s_openapi::api::core::v1::PodTemplateSpec;
use serde_json::{Map, Value};

use crate::pod::SERVER;

/// The volume with the models of a claim.
pub const MODELS: &str = "models";

/// The volume with what is fetched from a hub.
pub const CACHE: &str = "model-cache";

/// What a user may set of the container [`SERVER`]. Image, arguments, ports, resources and the other probes follow
/// from fields of the spec.
const SERVER_FIELDS: [&str; 8] = [
    "name",
    "env",
    "envFrom",
    "volumeMounts",
    "volumeDevices",
    "securityContext",
    "lifecycle",
    "startupProbe",
];

/// `base` with the fields of `overlay` set in it.
///
/// # Errors
/// One sentence that names the path of the first mistake and, where there is one, the remedy.
pub fn merge(base: &PodTemplateSpec, overlay: &Value) -> Result<PodTemplateSpec, String> {
    check_fields(overlay)?;
    check_metadata(&overlay["metadata"])?;
    check_spec(&overlay["spec"])?;
    let mut merged = serde_json::to_value(base)
        .map_err(|e| format!("the pod template can't be written: {e}"))?;
    merge_value(&mut merged, overlay);
    serde_json::from_value(merged).map_err(|e| format!("spec.podTemplate can't be merged: {e}"))
}

/// Every field is one of a pod template.
fn check_fields(overlay: &Value) -> Result<(), String> {
    let parsed: PodTemplateSpec = serde_json::from_value(overlay.clone())
        .map_err(|e| format!("spec.podTemplate can't be read: {e}"))?;
    let read = serde_json::to_value(&parsed)
        .map_err(|e| format!("spec.podTemplate can't be read: {e}"))?;
    match unread(overlay, &read, "spec.podTemplate") {
        Some(path) => Err(format!(
            "{path} is not a field of a pod template: remove it or correct its name"
        )),
        None => Ok(()),
    }
}

/// Only labels and annotations are set, and none of the operator's.
fn check_metadata(metadata: &Value) -> Result<(), String> {
    // Generators write `creationTimestamp: null`.
    for (field, _) in filled(metadata) {
        if field != "labels" && field != "annotations" {
            return Err(format!(
                "spec.podTemplate.metadata.{field} can't be set: only labels and annotations can"
            ));
        }
    }
    for map in ["labels", "annotations"] {
        for key in members(&metadata[map]) {
            if key.starts_with("kvasir.dev/") || key.starts_with("app.kubernetes.io/") {
                return Err(format!(
                    "spec.podTemplate.metadata.{map} must not hold {key:?}: the operator sets it"
                ));
            }
        }
    }
    Ok(())
}

/// Nothing is set that is the operator's.
fn check_spec(spec: &Value) -> Result<(), String> {
    for (field, remedy) in [
        (
            "terminationGracePeriodSeconds",
            "set spec.drainSeconds instead",
        ),
        ("restartPolicy", "a server is always restarted"),
    ] {
        if !spec[field].is_null() {
            return Err(format!(
                "spec.podTemplate.spec.{field} is the operator's: {remedy}"
            ));
        }
    }
    for server in named(&spec["containers"], SERVER) {
        if let Some(field) = server
            .iter()
            .filter(|(_, value)| !is_empty(value))
            .map(|(field, _)| field)
            .find(|field| !SERVER_FIELDS.contains(&field.as_str()))
        {
            let remedy = match field.as_str() {
                "image" => "set spec.image instead",
                "imagePullPolicy" => "set spec.imagePullPolicy instead",
                "args" | "command" => "set spec.engine.extraArgs instead",
                "resources" => "set spec.resources instead",
                _ => "it can't be changed",
            };
            return Err(format!(
                "spec.podTemplate.spec.containers[name={SERVER}].{field} is the operator's: {remedy}"
            ));
        }
    }
    for (list, name) in [
        ("initContainers", SERVER),
        ("volumes", MODELS),
        ("volumes", CACHE),
    ] {
        if named(&spec[list], name).next().is_some() {
            return Err(format!(
                "spec.podTemplate.spec.{list} must not hold the name {name:?}: it is the operator's"
            ));
        }
    }
    Ok(())
}

/// The members that say anything.
fn filled(object: &Value) -> impl Iterator<Item = (&String, &Value)> {
    let members = object.as_object().into_iter().flatten();
    members.filter(|(_, value)| !is_empty(value))
}

fn members(object: &Value) -> impl Iterator<Item = &String> {
    object.as_object().into_iter().flat_map(Map::keys)
}

/// The members of a list that have this name.
fn named<'a>(list: &'a Value, name: &'a str) -> impl Iterator<Item = &'a Map<String, Value>> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter(move |item| item["name"] == name)
        .filter_map(Value::as_object)
}

/// The path of the first field of `given` that `read`, the same after a typed reading, has lost.
fn unread(given: &Value, read: &Value, path: &str) -> Option<String> {
    match (given, read) {
        (Value::Object(given), _) => {
            given
                .iter()
                .filter(|(_, value)| !is_empty(value))
                .find_map(|(key, value)| {
                    let path = format!("{path}.{key}");
                    match read.get(key) {
                        Some(read) => unread(value, read, &path),
                        None => Some(path),
                    }
                })
        }
        (Value::Array(given), Value::Array(read)) => given
            .iter()
            .zip(read)
            .enumerate()
            .find_map(|(i, (given, read))| unread(given, read, &format!("{path}[{i}]"))),
        _ => None,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
        _ => false,
    }
}

/// Objects are merged member by member, lists of objects by the key that identifies their members, and anything
/// else is replaced. A null or an empty list changes nothing, except that a null in a security context takes the operator's
/// member away: some clusters choose users and groups themselves.
fn merge_value(base: &mut Value, overlay: &Value) {
    match (base, overlay) {
        (_, Value::Null) => {}
        (_, Value::Array(overlay)) if overlay.is_empty() => {}
        (Value::Object(base), Value::Object(overlay)) => {
            for (key, value) in overlay {
                match (base.get_mut("securityContext"), value) {
                    (Some(Value::Object(context)), Value::Object(set))
                        if key == "securityContext" =>
                    {
                        context.retain(|member, _| !set.get(member).is_some_and(Value::is_null));
                    }
                    _ => {}
                }
                merge_value(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(base), Value::Array(overlay)) if key_of(overlay).is_some() => {
            let key = key_of(overlay).unwrap_or("name");
            for item in overlay {
                match base.iter_mut().find(|other| other[key] == item[key]) {
                    Some(same) => merge_value(same, item),
                    None => base.push(item.clone()),
                }
            }
        }
        (base, overlay) => *base = overlay.clone(),
    }
}

/// The members of security contexts that `overlay` takes away, by their paths.
pub fn unset(overlay: &Value) -> Vec<String> {
    fn walk(value: &Value, path: &str, in_context: bool, found: &mut Vec<String>) {
        match value {
            Value::Null if in_context => found.push(path.to_owned()),
            Value::Object(members) => {
                for (key, value) in members {
                    let in_context = path.ends_with("/securityContext");
                    walk(value, &format!("{path}/{key}"), in_context, found);
                }
            }
            Value::Array(items) => {
                for (i, item) in items.iter().enumerate() {
                    walk(item, &format!("{path}/{i}"), false, found);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(overlay, "", false, &mut found);
    found.sort();
    found
}

/// The key that tells the members of a list apart: where they are mounted, or else their name.
fn key_of(list: &[Value]) -> Option<&'static str> {
    ["mountPath", "name"]
        .into_iter()
        .find(|key| !list.is_empty() && list.iter().all(|item| item[key].is_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> PodTemplateSpec {
        serde_json::from_value(json!({
            "metadata": { "labels": { "kvasir.dev/llmdeployment": "m" } },
            "spec": {
                "containers": [{ "name": "server", "image": "i", "resources": {}, "env": [{ "name": "A", "value": "1" }],
                    "securityContext": { "runAsNonRoot": true } }]
            }
        }))
        .unwrap()
    }

    #[test]
    fn merges_by_name() {
        let overlay = json!({
            "metadata": { "annotations": { "team": "x" } },
            "spec": {
                "nodeSelector": { "gpu": "h100" },
                "containers": [
                    { "name": "server", "env": [{ "name": "A", "value": "2" }, { "name": "B", "value": "3" }],
                      "securityContext": { "runAsUser": 7 } },
                    { "name": "sidecar", "image": "s" }
                ]
            }
        });
        let merged = serde_json::to_value(merge(&base(), &overlay).unwrap()).unwrap();
        let server = &merged["spec"]["containers"][0];
        assert_eq!(server["image"], "i", "what isn't set stays");
        assert_eq!(
            server["env"],
            json!([{ "name": "A", "value": "2" }, { "name": "B", "value": "3" }])
        );
        assert_eq!(
            server["securityContext"],
            json!({ "runAsNonRoot": true, "runAsUser": 7 })
        );
        assert_eq!(merged["spec"]["containers"][1]["name"], "sidecar");
        assert_eq!(merged["spec"]["nodeSelector"]["gpu"], "h100");
        assert_eq!(
            merged["metadata"]["labels"]["kvasir.dev/llmdeployment"],
            "m"
        );
    }

    #[test]
    fn names_each_mistake_by_its_path() {
        for (why, overlay, want) in [
            (
                "a misspelt field",
                json!({ "spec": { "nodeSelektor": { "a": "b" } } }),
                "spec.podTemplate.spec.nodeSelektor",
            ),
            (
                "a misspelt field inside a list",
                json!({ "spec": { "tolerations": [{ "key": "a", "efect": "NoSchedule" }] } }),
                "spec.podTemplate.spec.tolerations[0].efect",
            ),
            (
                "a wrong type",
                json!({ "spec": { "priority": "high" } }),
                "can't be read",
            ),
            (
                "the server's image",
                json!({ "spec": { "containers": [{ "name": "server", "image": "x" }] } }),
                "set spec.image",
            ),
            (
                "our label",
                json!({ "metadata": { "labels": { "kvasir.dev/llmdeployment": "x" } } }),
                "the operator sets it",
            ),
            (
                "the grace period",
                json!({ "spec": { "terminationGracePeriodSeconds": 1 } }),
                "spec.drainSeconds",
            ),
            (
                "our volume",
                json!({ "spec": { "volumes": [{ "name": "models", "emptyDir": {} }] } }),
                "must not hold the name",
            ),
            (
                "a name for the pods",
                json!({ "metadata": { "name": "x" } }),
                "only labels and annotations",
            ),
        ] {
            let error = merge(&base(), &overlay).unwrap_err();
            assert!(error.contains(want), "{why}: {error}");
        }
    }

    #[test]
    fn a_null_takes_a_member_of_a_security_context_away_and_nothing_else() {
        let overlay = json!({ "spec": {
            "nodeSelector": null,
            "containers": [{ "name": "server", "env": null,
                "securityContext": { "runAsNonRoot": null, "runAsUser": 7 } }] } });
        let merged = serde_json::to_value(merge(&base(), &overlay).unwrap()).unwrap();
        let server = &merged["spec"]["containers"][0];
        assert_eq!(server["securityContext"], json!({ "runAsUser": 7 }));
        assert_eq!(server["env"], json!([{ "name": "A", "value": "1" }]));
        assert_eq!(
            unset(&overlay),
            ["/spec/containers/0/securityContext/runAsNonRoot"]
        );
    }

    #[test]
    fn an_empty_overlay_changes_nothing() {
        for overlay in [
            json!({}),
            // As `kubectl create --dry-run=client -o yaml` writes a template.
            json!({ "metadata": { "creationTimestamp": null }, "spec": { "containers": [
                { "name": "server", "resources": {}, "image": null }] } }),
            json!({ "spec": null }),
            json!({ "spec": { "volumes": [] } }),
        ] {
            assert_eq!(merge(&base(), &overlay).unwrap(), base());
        }
    }
}
