//! Plans as tables: what is cut where, what is padded, what is captured.

use super::*;
use crate::shape::{AttentionShape, CacheId, CacheShape, cache_groups};
use crate::step::Span;
use crate::step::{StepInput, TableRow, TokenInput};

#[test]
fn buckets_are_few_and_close() {
    for (n, rows, tiles) in [
        (0, 0, 0),
        (1, 1, 1),
        (3, 4, 4),
        (8, 8, 8),
        (9, 16, 16),
        (17, 24, 32),
        (64, 64, 64),
        (65, 72, 72),
        (129, 144, 144),
        (257, 288, 288),
        (1000, 1024, 1024),
        (5000, 5056, 5120),
    ] {
        assert_eq!((bucket_rows(n), bucket_tiles(n)), (rows, tiles), "{n}");
    }
    for n in 1..20_000 {
        let padded = bucket_rows(n);
        assert!(padded >= n && padded - n < 64 && bucket_rows(padded) == padded);
        assert!(bucket_tiles(n) - n <= (n / 8).max(31), "{n}");
    }
}

/// A layer a window, of 8 query heads over 2.
fn shape(windows: &[Option<u32>]) -> ModelShape {
    let cache = |window: &Option<u32>| CacheShape {
        n_kv_heads: 2,
        head_dim: 64,
        window: window.and_then(NonZeroU32::new),
    };
    let caches: Vec<CacheShape> = windows.iter().map(cache).collect();
    let layer = |cache| AttentionShape {
        cache: CacheId(cache),
        n_heads: 8,
        rope: None,
        scale: 1.0,
        soft_cap: None,
    };
    ModelShape {
        vocab_size: 8,
        max_positions: 4096,
        block_size: 16,
        limits: Limits {
            max_tokens: 1024,
            max_sequences: 16,
            max_logits_rows: 16,
            max_blocks_per_sequence: 256,
        },
        ropes: Vec::new(),
        groups: cache_groups(&caches),
        layers: (0..caches.len() as u32).map(layer).collect(),
        caches,
    }
}

/// A step of spans of (first position, tokens).
fn step(shape: &ModelShape, spans: &[(u32, u32)]) -> Step {
    let mut step = Step::deferred(shape);
    let mut input = StepInput::default();
    for (row, &(first_position, n_tokens)) in spans.iter().enumerate() {
        input.spans.push(Span {
            row: TableRow(row as u32),
            first_token: input.tokens.len() as u32,
            n_tokens,
            first_position,
        });
        let tokens = (0..n_tokens).map(|_| TokenInput::Id(7));
        input.tokens.extend(tokens);
    }
    step.begin(&input);
    step
}

fn planned(windows: &[Option<u32>], spans: &[(u32, u32)]) -> Plan {
    let shape = shape(windows);
    let mut plan = Plan::new(&shape, 1);
    plan.make(&step(&shape, spans));
    plan
}

fn tiles(list: &SplitList) -> Vec<[u32; 3]> {
    let fields = list.tiles.iter().map(|i| [i.row, i.length, i.start]);
    fields.collect()
}

#[test]
fn decodes_are_cut_into_partitions_and_chunks_into_tiles() {
    let plan = planned(&[None], &[(0, 1), (255, 1), (256, 1), (10, 40)]);
    assert_eq!(
        tiles(&plan.splits[0]),
        [[0, 1, 0], [1, 256, 0], [2, 257, 0], [2, 257, 256]]
    );
    let sequences = plan.splits[0].sequences.iter();
    let combined: Vec<_> = sequences.map(|s| (s.first_tile, s.n_tiles)).collect();
    assert_eq!(combined, [(0, 1), (1, 1), (2, 2)]);
    let prefills = plan.prefills[0].tiles.iter();
    let cut: Vec<_> = prefills.map(|t| (t.first_token, t.first_row)).collect();
    assert_eq!(cut, [(3, 128), (3, 0)], "160 rows, the later ones first");
    assert!(plan.shape.splits[0].most == COMBINE_TOGETHER as usize && !plan.can_be_captured());
}

#[test]
fn a_span_of_a_few_tokens_is_as_many_decodes() {
    let plan = planned(&[None], &[(254, MAX_DECODE_TOKENS), (0, 1)]);
    assert!(plan.can_be_captured() && plan.prefills[0].tiles.is_empty());
    let sequences = plan.splits[0].sequences.iter();
    let tokens: Vec<_> = sequences.map(|s| (s.token, s.n_tiles)).collect();
    let want = [1, 1, 2, 2, 2, 2, 2, 2, 1];
    assert!(tokens.iter().copied().eq((0..).zip(want)), "{tokens:?}");
    let plan = planned(&[None], &[(254, MAX_DECODE_TOKENS + 1)]);
    assert!(!plan.can_be_captured() && plan.prefills[0].tiles.len() == 1);
}

/// Parts of each token of a chunk of `n` tokens at a position, of 8 query heads over 2, on 132 multiprocessors.
fn parts_of(position: u32, n: u32, room: usize) -> u32 {
    let mut shape = shape(&[None]);
    shape.max_positions = 16_384 + 1;
    shape.limits.max_tokens = 8192 + 1;
    shape.limits.max_blocks_per_sequence = 1025;
    let mut plan = Plan::new(&shape, 132);
    plan.room = room;
    plan.make(&step(&shape, &[(position, n), (position, 1)]));
    let list = &plan.prefills[0];
    let n_parts = list.tiles[0].n_parts;
    // Each tile's parts follow each other from the first key to the last.
    for parts in list.tiles.chunks(n_parts as usize) {
        let mut end = 0;
        for (index, tile) in (0..).zip(parts) {
            assert_eq!((tile.first_row, tile.first_key), (parts[0].first_row, end));
            assert!(tile.end_key > end && tile.first_partial == index);
            assert!(index == 0 || (end.is_multiple_of(64) && end <= position));
            end = tile.end_key;
        }
        assert_eq!(end, position + n);
    }
    // Every token of the chunk, and no other, is combined from parts of its own.
    let mut partials = 0;
    for (token, sequence) in (0..).zip(&list.sequences) {
        assert_eq!((sequence.token, sequence.first_tile), (token, partials));
        partials += sequence.n_tiles;
    }
    assert_eq!(partials, if n_parts > 1 { n * n_parts } else { 0 });
    assert!(
        partials as usize <= room && plan.layout.end <= plan.largest(&shape.limits).layout().end
    );
    n_parts
}

#[test]
fn the_keys_of_a_small_chunk_are_cut_where_multiprocessors_would_wait() {
    // 64 tokens are 2 tiles, and 4 blocks: many parts, but no more than are combined at once.
    assert!((12..=prefill::MOST_PARTS).contains(&parts_of(8000, 64, 8192)));
    // The chunk's own keys are in the last part.
    assert_eq!(parts_of(640, 64, 8192), 11);
    assert!(parts_of(64, 64, 8192) <= 2);
    assert_eq!(parts_of(0, 64, 8192), 1);
    assert_eq!(
        parts_of(63, 64, 8192),
        1,
        "no part is smaller than a tile of keys"
    );
    // 8,192 tokens are 512 blocks: enough.
    assert_eq!(parts_of(8192, 8192, 65536), 1);
    // As many parts as have room.
    assert_eq!(parts_of(8000, 64, 200), 3);
    assert_eq!(parts_of(8000, 64, 63), 1);
}

#[test]
fn a_layer_with_a_window_has_tiles_of_its_own_that_are_not_cut() {
    let shape = shape(&[None, Some(300), None]);
    let mut plan = Plan::new(&shape, 132);
    plan.make(&step(&shape, &[(3000, 64)]));
    let lists: Vec<usize> = (0..3).map(|layer| plan.lists_of(layer).prefill).collect();
    assert_eq!(lists, [0, 1, 0]);
    let most: Vec<usize> = plan.prefills.iter().map(|list| list.most).collect();
    assert!(
        most[0] > 1 && most[1] == 1 && plan.prefills[1].sequences.is_empty(),
        "{most:?}"
    );
}

#[test]
fn a_window_leaves_out_what_is_wholly_before_it() {
    let windows = [None, Some(256), Some(1), None, Some(256)];
    let plan = planned(&windows, &[(511, 1), (512, 1), (3, 1)]);
    let of_layer: Vec<usize> = (0..5).map(|layer| plan.lists_of(layer).split).collect();
    assert_eq!(of_layer, [0, 1, 2, 0, 1], "a list for each window");
    let starts = |list: &SplitList| tiles(list).iter().map(|t| (t[0], t[2])).collect::<Vec<_>>();
    let all = [(0, 0), (0, 256), (1, 0), (1, 256), (1, 512), (2, 0)];
    assert_eq!(starts(&plan.splits[0]), all);
    // Position 511 sees 256 to 511, position 512 sees 257 to 512.
    let some = [(0, 256), (1, 256), (1, 512), (2, 0)];
    assert_eq!(starts(&plan.splits[1]), some);
    assert_eq!(starts(&plan.splits[2]), [(0, 256), (1, 512), (2, 0)]);
    assert_eq!(plan.shape.splits[2].most, 1);
}

#[test]
fn what_has_no_room_together_goes_in_chunks() {
    let shape = shape(&[None]);
    let mut plan = Plan::new(&shape, 1);
    plan.room = 5;
    plan.make(&step(&shape, &[(511, 1), (1023, 1), (0, 1), (700, 1)]));
    let chunks = plan.chunks(0).iter();
    let chunks: Vec<_> = chunks
        .map(|c| (c.tiles.clone(), c.sequences.clone()))
        .collect();
    assert_eq!(chunks, [(0..2, 0..1), (2..7, 1..3), (7..10, 3..4)]);
    let sequences = plan.splits[0].sequences.iter();
    let first: Vec<u32> = sequences.map(|s| s.first_tile).collect();
    assert_eq!(first, [0, 0, 4, 0], "counted from the chunk's first");
    assert!(!plan.can_be_captured());
}

#[test]
fn no_step_is_larger_than_the_largest() {
    let windows = [None, Some(300)];
    let shape = shape(&windows);
    let mut plan = Plan::new(&shape, 1);
    let largest = plan.largest(&shape.limits).layout().end;
    for spans in [
        vec![(4088, 8); 16],
        vec![(4032, 64); 16],
        vec![(0, 1); 16],
        vec![(3072, 1024)],
    ] {
        plan.make(&step(&shape, &spans));
        assert!(plan.layout.end <= largest, "{spans:?}");
        let of = |list: &SplitList| list.chunks.iter().map(|c| c.tiles.len()).max();
        let most = plan.splits.iter().filter_map(of).max().unwrap_or(0);
        assert!(most <= plan.workspace_tiles(), "{spans:?}");
    }
}

#[test]
fn padding_is_inert() {
    let shape = shape(&[None]);
    let (mut plan, step) = (
        Plan::new(&shape, 1),
        step(&shape, &[(5, 1), (6, 1), (7, 1)]),
    );
    plan.make(&step);
    let layout = plan.layout();
    let mut bytes = vec![0xaa; layout.end];
    plan.write(&step, &mut bytes);
    let positions: &[u32] = bytemuck::cast_slice(&bytes[layout.positions..layout.rows]);
    assert_eq!(positions, [5, 6, 7, INERT]);
    let split = layout.splits[0];
    let tiles: &[SplitKvTile] = bytemuck::cast_slice(&bytes[split.tiles..split.sequences]);
    assert_eq!((tiles.len(), tiles[3].length), (4, 0));
}
