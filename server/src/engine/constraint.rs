//! What may restrict the tokens of a sequence beyond what its request says in numbers: a grammar, a JSON schema.
//!
//! It knows token ids, never text; what the ids stand for is the business of who implements it.

use std::fmt::Debug;

/// The restriction of one sequence, as far as its output has come. It belongs to its sequence and goes with it through
/// preemptions; both methods run on the engine's thread, while the device computes the pass whose token is restricted.
pub trait Constraint: Debug + Send {
    /// The sequence goes on with this token, one that the last mask allowed. Called once for each output, in order; not for
    /// the token that ends the sequence.
    fn advance(&mut self, token: u32);

    /// Sets the bit of each token that may come next: token `t` is bit `t % 32`, counted from the lowest, of `mask[t / 32]`.
    /// The mask has a word for each 32 tokens of the vocabulary, and comes as zeros. What may end the output here is among
    /// its tokens too. Where no bit is set the sequence can only end: its stop tokens are allowed.
    fn fill_mask(&mut self, mask: &mut [u32]);

    /// The same for another sequence that has come as far.
    fn fork(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.fork()
    }
}
