//! Hand edits of the child Deployment's pod template: whose fields they are, and how to take them back.
//!
//! Pure. Server-side apply restores a field that we apply, yet leaves alone what another manager has added. So its
//! fields are first made ours, in `metadata.managedFields`, which changes no pod; the apply that follows then takes out
//! what it doesn't name (Kubernetes, Server-Side Apply, "Transferring ownership").

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{FieldsV1, ManagedFieldsEntry};
use serde_json::{Map, Value};

use super::children::FIELD_MANAGER;

/// The managed fields with all of `spec.template` in our hands; `None` where nobody else holds any of it, or where we
/// never applied it.
#[must_use]
pub fn reclaimed(running: &Deployment) -> Option<Vec<ManagedFieldsEntry>> {
    let mut entries = running.metadata.managed_fields.clone()?;
    let ours = entries.iter().position(is_ours)?;
    let mut taken = Map::new();
    // An entry of our name that is no apply's is what admission changed in it: that would come back each time.
    for entry in entries.iter_mut().filter(|entry| is_foreign(entry)) {
        if let Some(template) = take_template(entry) {
            unite(&mut taken, template);
        }
    }
    if taken.is_empty() {
        return None;
    }
    let fields = &mut entries[ours].fields_v1.get_or_insert(empty()).0;
    let template = member(member(fields, "f:spec")?, "f:template")?;
    unite(template.as_object_mut()?, taken);
    entries.retain(|entry| !is_foreign(entry) || !holds_nothing(entry));
    Some(entries)
}

fn is_ours(entry: &ManagedFieldsEntry) -> bool {
    entry.manager.as_deref() == Some(FIELD_MANAGER)
        && entry.operation.as_deref() == Some("Apply")
        && entry.subresource.as_deref().unwrap_or_default().is_empty()
}

fn is_foreign(entry: &ManagedFieldsEntry) -> bool {
    entry.manager.as_deref() != Some(FIELD_MANAGER)
        && entry.subresource.as_deref().unwrap_or_default().is_empty()
}

fn holds_nothing(entry: &ManagedFieldsEntry) -> bool {
    let fields = entry.fields_v1.as_ref();
    fields.is_none_or(|fields| fields.0.as_object().is_none_or(Map::is_empty))
}

/// Takes the fields below `spec.template` out of an entry, and `spec` with them where nothing else was in it.
fn take_template(entry: &mut ManagedFieldsEntry) -> Option<Map<String, Value>> {
    let fields = entry.fields_v1.as_mut()?.0.as_object_mut()?;
    let spec = fields.get_mut("f:spec")?.as_object_mut()?;
    let template = spec.remove("f:template")?;
    if spec.is_empty() {
        fields.remove("f:spec");
    }
    match template {
        Value::Object(template) => Some(template),
        _ => None,
    }
}

/// The member of this name, made where it is missing.
fn member<'a>(fields: &'a mut Value, name: &str) -> Option<&'a mut Value> {
    let fields = fields.as_object_mut()?;
    Some(fields.entry(name).or_insert_with(|| empty().0))
}

fn empty() -> FieldsV1 {
    FieldsV1(Value::Object(Map::new()))
}

/// The union of two sets of fields, each a tree of members.
fn unite(into: &mut Map<String, Value>, from: Map<String, Value>) {
    for (name, value) in from {
        match (into.get_mut(&name), value) {
            (Some(Value::Object(into)), Value::Object(from)) => unite(into, from),
            (Some(_), _) => {}
            (None, value) => drop(into.insert(name, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry(manager: &str, operation: &str, subresource: &str, fields: Value) -> Value {
        json!({ "manager": manager, "operation": operation, "subresource": subresource,
            "apiVersion": "apps/v1", "fieldsType": "FieldsV1", "fieldsV1": fields })
    }

    fn reclaimed_of(entries: &[Value]) -> Option<Value> {
        let running = json!({ "metadata": { "managedFields": entries } });
        let reclaimed = reclaimed(&serde_json::from_value(running).unwrap())?;
        Some(serde_json::to_value(reclaimed).unwrap())
    }

    fn template(fields: Value) -> Value {
        json!({ "f:spec": { "f:template": fields } })
    }

    #[test]
    fn takes_the_template_and_nothing_else() {
        let ours = entry(
            FIELD_MANAGER,
            "Apply",
            "",
            json!({ "f:spec": { "f:replicas": {}, "f:template": { "f:spec": { "f:dnsPolicy": {} } } } }),
        );
        let edit = entry(
            "kubectl-edit",
            "Update",
            "",
            json!({ "f:metadata": { "f:labels": { "f:team": {} } },
                "f:spec": { "f:template": { "f:spec": { "f:hostNetwork": {} }, "f:metadata": { "f:annotations": {} } } } }),
        );
        let restart = entry(
            "kubectl-rollout",
            "Update",
            "",
            template(json!({ "f:spec": { "f:hostNetwork": {}, "f:hostPID": {} } })),
        );
        let status = entry(
            "kube-controller-manager",
            "Update",
            "status",
            json!({ "f:status": {} }),
        );
        let got = reclaimed_of(&[ours, edit, status, restart]).unwrap();
        assert_eq!(
            got[0]["fieldsV1"],
            json!({ "f:spec": { "f:replicas": {}, "f:template": {
                "f:spec": { "f:dnsPolicy": {}, "f:hostNetwork": {}, "f:hostPID": {} },
                "f:metadata": { "f:annotations": {} } } } }),
            "the union is ours"
        );
        assert_eq!(
            got[1]["fieldsV1"],
            json!({ "f:metadata": { "f:labels": { "f:team": {} } } }),
            "a label of the Deployment is no business of ours"
        );
        assert_eq!(got[2]["manager"], "kube-controller-manager");
        assert_eq!(
            got.as_array().unwrap().len(),
            3,
            "an entry of nothing is dropped"
        );
    }

    #[test]
    fn nothing_is_taken_where_nobody_edited() {
        let ours = || {
            entry(
                FIELD_MANAGER,
                "Apply",
                "",
                template(json!({ "f:spec": {} })),
            )
        };
        let theirs = || template(json!({ "f:spec": { "f:hostPID": {} } }));
        for (why, entries) in [
            ("ours alone", vec![ours()]),
            (
                "admission, which would come back",
                vec![ours(), entry(FIELD_MANAGER, "Update", "", theirs())],
            ),
            (
                "a subresource",
                vec![
                    ours(),
                    entry(
                        "hpa",
                        "Update",
                        "scale",
                        json!({ "f:spec": { "f:replicas": {} } }),
                    ),
                ],
            ),
            (
                "another field of the spec",
                vec![
                    ours(),
                    entry(
                        "kubectl-edit",
                        "Update",
                        "",
                        json!({ "f:spec": { "f:paused": {} } }),
                    ),
                ],
            ),
            (
                "never applied by us",
                vec![entry("kubectl", "Update", "", theirs())],
            ),
        ] {
            assert_eq!(reclaimed_of(&entries), None, "{why}");
        }
    }
}
