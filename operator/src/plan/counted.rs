//! Numbers with their nouns, for sentences that people read.

/// `1 replica`, `0 replicas`, `3 replicas`.
pub fn counted(n: impl Into<u64>, noun: &str) -> String {
    match n.into() {
        1 => format!("1 {noun}"),
        n => format!("{n} {noun}s"),
    }
}

/// `1 replica is`, `3 replicas are`.
pub fn counted_are(n: impl Into<u64>, noun: &str) -> String {
    let n = n.into();
    let verb = if n == 1 { "is" } else { "are" };
    format!("{} {verb}", counted(n, noun))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_singular() {
        let said = |n: u32| counted_are(n, "replica");
        assert_eq!(said(0), "0 replicas are");
        assert_eq!(said(1), "1 replica is");
        assert_eq!(said(2), "2 replicas are");
    }
}
