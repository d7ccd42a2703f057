//! The arithmetic of [`LogitsEdit`]: single correctly rounded f32 operations, in vLLM's order. `kernels/cuda/edit_logits.cu`
//! does the same.

use crate::step::{LogitsEdit, Penalties};

/// Fills `edited` with the row as tokens are sampled from it.
pub(super) fn edit_logits(logits: &[f32], edit: &LogitsEdit, edited: &mut Vec<f32>) {
    edited.clear();
    match &edit.allowed {
        None => edited.extend_from_slice(logits),
        Some(words) => {
            for (logits, word) in logits.chunks(32).zip(words.iter()) {
                edited.extend(logits.iter().zip(0..32).map(|(&logit, bit)| {
                    match word >> bit & 1 {
                        0 => f32::NEG_INFINITY,
                        _ => logit,
                    }
                }));
            }
        }
    }
    for bias in edit.biases.iter() {
        edited[bias.token as usize] += bias.bias;
    }
    let Some(penalties) = &edit.penalties else {
        return;
    };
    for seen in penalties.seen.iter() {
        let logit = &mut edited[seen.token as usize];
        *logit = penalized(*logit, penalties, seen.n_outputs);
    }
}

fn penalized(logit: f32, penalties: &Penalties, n_outputs: u32) -> f32 {
    let logit = match logit > 0.0 {
        true => logit / penalties.repetition,
        false => logit * penalties.repetition,
    };
    if n_outputs == 0 {
        return logit;
    }
    (logit - penalties.frequency * n_outputs as f32) - penalties.presence
}
