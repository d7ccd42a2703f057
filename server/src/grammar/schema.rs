//! Bounds on JSON schemas. What llguidance does with one takes time and memory for what it becomes, not for what it is: an
//! `allOf` multiplies its members, a `$ref` beside other keywords is copied, a chain of references is followed by
//! recursion. So the cost is counted before, from above.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::{GrammarError, at_most};

/// Values in a schema, inner ones included.
const MAX_VALUES: usize = 20_000;

/// Objects and lists inside each other.
const MAX_DEPTH: usize = 64;

/// Schemas inside each other when every reference is followed once: llguidance follows them by recursion.
const MAX_REFERENCED_DEPTH: usize = 3_000;

/// Subschemas after all that is copied or combined.
const MAX_EXPANDED: usize = 50_000;

/// `pattern`s: each is tried for whether anything matches it.
const MAX_PATTERNS: usize = 500;

/// Pairs of `patternProperties` in one object: each is tried for whether a name can match both.
const MAX_PATTERN_PAIRS: usize = 1_000;

/// Properties of one object that may be left out: the parser follows all of them at once.
const MAX_OPTIONAL: usize = 1_000;

/// Keywords that say something of a schema and nothing of what fits it.
const ANNOTATIONS: &[&str] = &[
    "$anchor",
    "$defs",
    "definitions",
    "$schema",
    "$id",
    "id",
    "$comment",
    "title",
    "description",
    "default",
    "readOnly",
    "writeOnly",
    "examples",
    "contentMediaType",
    "contentEncoding",
];

/// Keywords that bring further schemas for the same value.
const IN_PLACE: &[&str] = &["allOf", "anyOf", "oneOf", "$ref", "enum", "const"];

/// Refuses a schema that would cost too much.
pub(super) fn check(schema: &Value) -> Result<(), GrammarError> {
    let mut plain = Plain::default();
    plain.count(schema, 1)?;
    at_most("values of the schema", plain.n_values, MAX_VALUES)?;
    at_most("patterns of the schema", plain.n_patterns, MAX_PATTERNS)?;
    let pairs = plain.n_pattern_pairs;
    at_most("pairs of patternProperties", pairs, MAX_PATTERN_PAIRS)?;
    Expansion::new(schema).check()
}

/// Puts what the options of each `oneOf` refer to in their place: only so does llguidance see that no value fits two of them,
/// where a member of theirs tells them apart. As much as `MAX_VALUES` values.
pub(super) fn with_options_in_place(schema: Value) -> Value {
    let mut whole = schema.clone();
    let mut budget = MAX_VALUES;
    put_options(&mut whole, &schema, &mut budget);
    whole
}

fn put_options(value: &mut Value, root: &Value, budget: &mut usize) {
    match value {
        Value::Array(items) => items
            .iter_mut()
            .for_each(|item| put_options(item, root, budget)),
        Value::Object(members) => {
            for (keyword, member) in members {
                if matches!(keyword.as_str(), "const" | "enum" | "default" | "examples") {
                    continue;
                }
                put_options(member, root, budget);
                let Some(options) = member.as_array_mut().filter(|_| keyword == "oneOf") else {
                    continue;
                };
                for option in options {
                    let reference = option["$ref"].as_str();
                    let is_alone = option.as_object().is_some_and(|members| !has_own(members));
                    if let Some(target) = reference.and_then(|reference| resolve(root, reference))
                        && is_alone
                        && let Some(left) = budget.checked_sub(n_values(target))
                    {
                        *option = target.clone();
                        *budget = left;
                    }
                }
            }
        }
        _ => {}
    }
}

fn n_values(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(n_values).sum(),
        Value::Object(members) => members.values().map(n_values).sum::<usize>(),
        _ => 0,
    }
}

/// What can be counted without following references.
#[derive(Default)]
struct Plain {
    n_values: usize,
    n_patterns: usize,
    n_pattern_pairs: usize,
}

impl Plain {
    fn count(&mut self, value: &Value, depth: usize) -> Result<(), GrammarError> {
        at_most("objects and lists inside each other", depth, MAX_DEPTH)?;
        self.n_values += 1;
        match value {
            Value::Array(items) => {
                for item in items {
                    self.count(item, depth + 1)?;
                }
            }
            Value::Object(members) => {
                self.n_patterns += usize::from(members.contains_key("pattern"));
                let optional = members.get("properties").and_then(Value::as_object);
                let required = members.get("required").and_then(Value::as_array);
                let n = optional.map_or(0, Map::len);
                let n = n.saturating_sub(required.map_or(0, Vec::len));
                at_most("optional properties of one object", n, MAX_OPTIONAL)?;
                let patterns = members.get("patternProperties").and_then(Value::as_object);
                let n = patterns.map_or(0, Map::len);
                self.n_patterns += n;
                self.n_pattern_pairs += n * n;
                for member in members.values() {
                    self.count(member, depth + 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Counts subschemas after all is followed.
struct Expansion<'a> {
    root: &'a Value,
    /// References that stay references, still to be counted.
    to_do: Vec<&'a str>,
    /// Sizes of what references name, by whether they are copied; `None` while it is being counted.
    sizes: HashMap<(&'a str, Place), Option<usize>>,
}

/// Where a schema stands.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    /// For itself.
    Alone,
    /// Beside others for the same value: what it refers to is copied and combined with them.
    Combined,
}

impl<'a> Expansion<'a> {
    fn new(root: &'a Value) -> Self {
        Self {
            root,
            to_do: Vec::new(),
            sizes: HashMap::new(),
        }
    }

    fn check(mut self) -> Result<(), GrammarError> {
        let mut total = self.size(self.root, Place::Alone, 0)?;
        let mut depth = depth_of(self.root);
        while let Some(reference) = self.to_do.pop() {
            if self.sizes.contains_key(&(reference, Place::Alone)) {
                continue;
            }
            let Some(target) = resolve(self.root, reference) else {
                // The compiler says it in its words.
                continue;
            };
            total = total.saturating_add(self.size_of_target(reference, Place::Alone, 0)?);
            depth += depth_of(target);
            let limit = MAX_REFERENCED_DEPTH;
            at_most("schemas inside each other through $ref", depth, limit)?;
            expanded(total)?;
        }
        expanded(total)
    }

    fn size_of_target(
        &mut self,
        reference: &'a str,
        place: Place,
        n_refs: usize,
    ) -> Result<usize, GrammarError> {
        match self.sizes.get(&(reference, place)) {
            Some(Some(size)) => return Ok(*size),
            Some(None) => {
                return Err(GrammarError::Invalid(format!(
                    "the reference {reference:?} comes back to itself beside other keywords, which is not supported"
                )));
            }
            None => {}
        }
        at_most("references that lead to references", n_refs, MAX_DEPTH)?;
        let Some(target) = resolve(self.root, reference) else {
            return Ok(1);
        };
        self.sizes.insert((reference, place), None);
        let size = self.size(target, place, n_refs + 1)?;
        self.sizes.insert((reference, place), Some(size));
        Ok(size)
    }

    /// How many subschemas one becomes: the product of all that is said of the same value.
    fn size(
        &mut self,
        schema: &'a Value,
        place: Place,
        n_refs: usize,
    ) -> Result<usize, GrammarError> {
        let Some(members) = schema.as_object() else {
            return Ok(1);
        };
        let own = self.own_size(members, n_refs)?;
        let n_parts = usize::from(has_own(members))
            + members
                .iter()
                .map(|(keyword, value)| match keyword.as_str() {
                    "allOf" => value.as_array().map_or(1, Vec::len),
                    keyword => usize::from(IN_PLACE.contains(&keyword)),
                })
                .sum::<usize>();
        let place = match n_parts > 1 {
            true => Place::Combined,
            false => place,
        };
        let mut size = own;
        for (keyword, value) in members {
            size = size.saturating_mul(match keyword.as_str() {
                "allOf" => self.product(value, place, n_refs)?,
                "anyOf" | "oneOf" => self.sum(value, place, n_refs)?,
                "enum" => value.as_array().map_or(1, |values| values.len().max(1)),
                "$ref" => match (value.as_str(), place) {
                    (Some(reference), Place::Combined) => {
                        self.size_of_target(reference, place, n_refs)?
                    }
                    (Some(reference), Place::Alone) => {
                        self.to_do.push(reference);
                        1
                    }
                    (None, _) => 1,
                },
                _ => 1,
            });
            expanded(size)?;
        }
        Ok(size)
    }

    /// Of what is said of parts of the value.
    fn own_size(
        &mut self,
        members: &'a Map<String, Value>,
        n_refs: usize,
    ) -> Result<usize, GrammarError> {
        let n_properties = members
            .get("properties")
            .and_then(Value::as_object)
            .map_or(0, Map::len);
        let mut size = 1_usize;
        for (keyword, value) in members {
            let more = match keyword.as_str() {
                "properties" => self.sum_members(value, n_refs)?,
                // A property that one matches gets a copy.
                "patternProperties" => self
                    .sum_members(value, n_refs)?
                    .saturating_mul(n_properties + 1),
                "items" | "prefixItems" if value.is_array() => {
                    self.sum(value, Place::Alone, n_refs)?
                }
                "items" | "additionalItems" | "additionalProperties" => {
                    self.size(value, Place::Alone, n_refs)?
                }
                _ => 0,
            };
            size = size.saturating_add(more);
        }
        Ok(size)
    }

    fn sum_members(&mut self, value: &'a Value, n_refs: usize) -> Result<usize, GrammarError> {
        let members = value.as_object().into_iter().flat_map(Map::values);
        let mut sum = 0_usize;
        for member in members {
            sum = sum.saturating_add(self.size(member, Place::Alone, n_refs)?);
        }
        Ok(sum)
    }

    fn sum(
        &mut self,
        value: &'a Value,
        place: Place,
        n_refs: usize,
    ) -> Result<usize, GrammarError> {
        let mut sum = 0_usize;
        for option in value.as_array().into_iter().flatten() {
            sum = sum.saturating_add(self.size(option, place, n_refs)?);
        }
        Ok(sum.max(1))
    }

    fn product(
        &mut self,
        value: &'a Value,
        place: Place,
        n_refs: usize,
    ) -> Result<usize, GrammarError> {
        let mut product = 1_usize;
        for member in value.as_array().into_iter().flatten() {
            product = product.saturating_mul(self.size(member, place, n_refs)?);
            expanded(product)?;
        }
        Ok(product)
    }
}

fn expanded(n: usize) -> Result<(), GrammarError> {
    at_most(
        "subschemas after references and combinations",
        n,
        MAX_EXPANDED,
    )
}

/// Whether it says something of its value itself.
fn has_own(members: &Map<String, Value>) -> bool {
    let mut keywords = members.keys().map(String::as_str);
    keywords.any(|keyword| !ANNOTATIONS.contains(&keyword) && !IN_PLACE.contains(&keyword))
}

/// What a reference inside the document names, as llguidance finds it.
fn resolve<'a>(root: &'a Value, reference: &str) -> Option<&'a Value> {
    if matches!(reference, "#" | "#/") {
        return Some(root);
    }
    let mut value = root;
    for segment in reference.strip_prefix("#/")?.split('/') {
        value = match value {
            Value::Array(items) => items.get(segment.parse::<usize>().ok()?)?,
            value => value.get(segment)?,
        };
    }
    Some(value)
}

fn depth_of(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth_of).max().unwrap_or(0),
        Value::Object(members) => 1 + members.values().map(depth_of).max().unwrap_or(0),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Definitions `d0` to `dn`, each made of the one before.
    fn chain(n: usize, next: impl Fn(Value) -> Value) -> Value {
        let mut defs = Map::new();
        defs.insert("d0".into(), json!({"type": "integer"}));
        for i in 1..=n {
            let before = json!({"$ref": format!("#/$defs/d{}", i - 1)});
            defs.insert(format!("d{i}"), next(before));
        }
        json!({"$ref": format!("#/$defs/d{n}"), "$defs": defs})
    }

    fn nested(n: usize) -> Value {
        (0..n).fold(json!({}), |inner, _| json!({"items": inner}))
    }

    #[test]
    fn what_people_write_is_within_bounds() {
        for (why, schema) in [
            (
                "a recursive tree",
                json!({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object",
                "properties": {"value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                "parent": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}], "default": null}}}}}),
            ),
            (
                "a tree by an allOf of one",
                json!({"$ref": "#/$defs/node", "$defs": {"node": {"properties": {"next": {"allOf": [{"$ref": "#/$defs/node"}], "title": "x"}}}}}),
            ),
            (
                "the root itself",
                json!({"type": "object", "properties": {"next": {"$ref": "#"}}}),
            ),
            (
                "a reference beside a keyword",
                json!({"properties": {"a": {"$ref": "#/$defs/x", "minimum": 3}},
                "$defs": {"x": {"type": "integer"}}}),
            ),
            (
                "200 definitions in a chain",
                chain(
                    200,
                    |before| json!({"type": "object", "properties": {"a": before}}),
                ),
            ),
            (
                "many choices",
                json!({"type": "string", "enum": (0..10_000).map(|i| i.to_string()).collect::<Vec<_>>()}),
            ),
            (
                "a reference to nowhere is the compiler's to refuse",
                json!({"$ref": "#/$defs/none", "type": "object"}),
            ),
        ] {
            assert_eq!(check(&schema), Ok(()), "{why}");
        }
    }

    #[test]
    fn a_schema_that_would_cost_too_much_is_refused_by_what_is_too_large() {
        let wide: Map<String, Value> = (0..300).map(|i| (format!("p{i}"), json!({}))).collect();
        let patterns: Map<String, Value> = (0..40).map(|i| (format!("^p{i}"), json!({}))).collect();
        for (why, schema, want) in [
            (
                "size",
                json!({"enum": vec![1; 30_000]}),
                "values of the schema: 30002, at most 20000",
            ),
            (
                "nesting",
                nested(70),
                "objects and lists inside each other: 65, at most 64",
            ),
            (
                "a chain of references",
                chain(1_000, |before| json!({"properties": {"a": before}})),
                "schemas inside each other through $ref",
            ),
            (
                "copies that double",
                chain(40, |before| {
                    let copied = json!({"type": "integer", "$ref": before["$ref"]});
                    json!({"type": "object", "properties": {"a": copied, "b": copied}})
                }),
                "subschemas after references and combinations",
            ),
            (
                "combinations that multiply",
                json!({"allOf": (0..20).map(|_| json!({"anyOf": [{"type": "string"}, {"type": "integer"}]})).collect::<Vec<_>>()}),
                "subschemas after references and combinations",
            ),
            (
                "objects that are combined",
                json!({"allOf": [{"properties": wide}, {"properties": wide}]}),
                "subschemas after references and combinations",
            ),
            (
                "names that may match several patterns",
                json!({"patternProperties": patterns}),
                "pairs of patternProperties: 1600, at most 1000",
            ),
            (
                "properties",
                json!({"properties": (0..1_100).map(|i| (format!("p{i}"), json!({}))).collect::<Map<_, _>>()}),
                "optional properties of one object: 1100, at most 1000",
            ),
            (
                "patterns",
                json!({"prefixItems": vec![json!({"pattern": "a"}); 600]}),
                "patterns of the schema: 600, at most 500",
            ),
            (
                "a circle",
                json!({"$ref": "#/$defs/a", "type": "object", "$defs": {"a": {"$ref": "#/$defs/a", "type": "object"}}}),
                "comes back to itself",
            ),
        ] {
            let error = check(&schema).unwrap_err().to_string();
            assert!(error.contains(want), "{why}: {error}");
        }
    }
}
