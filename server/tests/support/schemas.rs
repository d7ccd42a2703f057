//! JSON schemas by chance, the same for the same seed. What fits one is finite and short: a model of random weights comes to
//! its end.
#![allow(dead_code)]

use serde_json::{Map, Value, json};

/// Numbers by chance (SplitMix64).
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// An object, with references to definitions of its own in some.
pub(crate) fn schema(seed: u64) -> Value {
    let mut chance = Chance::new(seed);
    let mut schema = object(&mut chance, 3);
    if chance.below(3) == 0 {
        let list = json!({"type": "object", "properties": {"value": leaf(&mut chance),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]}}, "required": ["value"], "additionalProperties": false});
        schema["$defs"] = json!({"list": list, "name": leaf(&mut chance)});
        schema["properties"]["list"] = json!({"$ref": "#/$defs/list"});
        schema["properties"]["name"] = json!({"$ref": "#/$defs/name"});
        schema["required"] = json!(["name"]);
    }
    schema
}

fn any(chance: &mut Chance, depth: usize) -> Value {
    match chance.below(if depth == 0 { 1 } else { 4 }) {
        1 => object(chance, depth - 1),
        2 => array(chance, depth - 1),
        3 => json!({"anyOf": [leaf(chance), object(chance, depth - 1), {"type": "boolean"}]}),
        _ => leaf(chance),
    }
}

fn object(chance: &mut Chance, depth: usize) -> Value {
    let names = ["id", "na\"me", "größe", "a b", "tags", "x/y", ""];
    let mut properties = Map::new();
    let mut required = Vec::new();
    for _ in 0..chance.below(4) {
        let name = names[chance.below(names.len())];
        properties.insert(name.to_owned(), any(chance, depth));
        if chance.below(2) == 0 && !required.contains(&name) {
            required.push(name);
        }
    }
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

fn array(chance: &mut Chance, depth: usize) -> Value {
    let least = chance.below(3);
    match chance.below(3) {
        0 => {
            json!({"type": "array", "prefixItems": [leaf(chance), any(chance, depth)], "items": false, "minItems": least})
        }
        _ => {
            json!({"type": "array", "items": any(chance, depth), "minItems": least, "maxItems": least + chance.below(3)})
        }
    }
}

fn leaf(chance: &mut Chance) -> Value {
    let low = chance.below(300) as i64 - 150;
    match chance.below(12) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": ["integer", "null"], "minimum": low, "maximum": low + 70}),
        2 => {
            json!({"type": "integer", "exclusiveMinimum": low, "maximum": low + 900, "multipleOf": 7})
        }
        3 => json!({"type": "string", "maxLength": 1 + chance.below(12)}),
        4 => json!({"type": "string", "minLength": 2, "maxLength": 5}),
        5 => json!({"type": "string", "pattern": "^[a-f]{1,4}(-[0-9]{2})?$"}),
        6 => {
            let format = ["date", "uuid", "ipv4"][chance.below(3)];
            json!({"type": "string", "format": format})
        }
        7 => json!({"enum": ["red", "green \"x\"", 3, null, true, 2.5, "\n\t\u{1f642}"]}),
        8 => json!({"const": {"a": [1, "two"], "b": null}}),
        9 => json!({"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 9}]}),
        10 => {
            json!({"oneOf": [{"type": "integer", "minimum": 1, "maximum": 3}, {"type": "string", "enum": ["none"]}]})
        }
        _ => json!({"type": "null"}),
    }
}

/// Whether a validator of its own accepts the value, and if not, why.
pub(crate) fn judge(schema: &Value, value: &Value) -> Result<(), String> {
    let mut schemas = boon::Schemas::new();
    let mut compiler = boon::Compiler::new();
    compiler.enable_format_assertions();
    let at = "http://localhost/schema.json";
    compiler
        .add_resource(at, schema.clone())
        .map_err(|e| format!("{e:#}"))?;
    let index = compiler
        .compile(at, &mut schemas)
        .map_err(|e| format!("{e:#}"))?;
    schemas.validate(value, index).map_err(|e| format!("{e:#}"))
}
