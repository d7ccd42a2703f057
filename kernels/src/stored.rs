//! Weights as checkpoints store them: dense, fp8 with scales, int4 in groups. All devices read rows of a stored matrix
//! by the same code here; what they keep is theirs.
//!
//! It knows the element layouts and no file format: names and shapes of tensors are the model loader's business.

/// Element type of a stored tensor of floating-point numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of an f32.
    BF16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The value of one element, from its [`Dtype::bytes`] little-endian bytes; exact.
    pub(crate) fn to_f32(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Self::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
            (Self::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
            _ => unreachable!("an element has as many bytes as its dtype"),
        }
    }
}

/// A row-major tensor in somebody else's memory, usually a mapped file. The bytes need not be aligned.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Element type of `bytes`.
    pub dtype: Dtype,
    /// `[rows, cols]`; a vector is `[1, n]`.
    pub shape: [usize; 2],
    /// `rows * cols * dtype.bytes()` bytes, little endian.
    pub bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// The bytes of a row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let n = self.shape[1] * self.dtype.bytes();
        &self.bytes[row * n..][..n]
    }

    /// The element at `row`, `col`, as f32; exact.
    pub fn at(&self, row: usize, col: usize) -> f32 {
        let n = self.dtype.bytes();
        self.dtype
            .to_f32(&self.bytes[(row * self.shape[1] + col) * n..][..n])
    }

    fn has_all_bytes(&self) -> bool {
        self.bytes.len() == self.shape[0] * self.shape[1] * self.dtype.bytes()
    }
}

/// 8-bit floating-point numbers and their scales: `w[r][c] = values[r][c] * scales[r / block[0]][c / block[1]]`
/// (OCP 8-bit Floating Point Specification, E4M3; one scale in all has a block of the whole matrix, one a channel has
/// blocks of one row).
#[derive(Clone, Copy, Debug)]
pub struct Fp8<'a> {
    /// `[rows, cols]`
    pub shape: [usize; 2],
    /// E4M3, one byte each, row-major.
    pub values: &'a [u8],
    /// `[ceil(rows / block[0]), ceil(cols / block[1])]`
    pub scales: TensorView<'a>,
    /// Rows and columns that share a scale.
    pub block: [usize; 2],
}

/// How the eight 4-bit numbers of an `i32` follow each other, and along which dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int4Order {
    /// GPTQ: `qweight` is `[in / 8, out]`, eight successive inputs in a word, lowest bits first; `qzeros` `[groups,
    /// out / 8]`, stored less one.
    Gptq,
    /// AWQ (GEMM): `qweight` is `[in, out / 8]`, outputs 0, 2, 4, 6, 1, 3, 5, 7 in a word from its lowest bits; `qzeros`
    /// `[groups, out / 8]` likewise.
    Awq,
    /// compressed-tensors, pack-quantized: `weight_packed` is `[out, ceil(in / 8)]`, eight successive inputs in a word,
    /// lowest bits first, stored plus 8; zero points `[ceil(out / 8), groups]`, eight outputs in a word, plus 8 too.
    PackQuantized,
}

/// 4-bit integers in groups along the input: `w[r][c] = (q[r][c] - zero[r][g]) * scale[r][g]`, `g` the group of input
/// `c`.
#[derive(Clone, Copy, Debug)]
pub struct Int4<'a> {
    /// `[rows, cols]` = `[out, in]`.
    pub shape: [usize; 2],
    /// How the words are laid out.
    pub order: Int4Order,
    /// The packed numbers: `i32`, little endian.
    pub values: &'a [u8],
    /// `[groups, out]` for GPTQ and AWQ, `[out, groups]` for pack-quantized.
    pub scales: TensorView<'a>,
    /// The packed zero points: `i32`, little endian. `None`: symmetric, the zero is 8 as stored.
    pub zeros: Option<&'a [u8]>,
    /// Inputs that share a scale.
    pub group_size: usize,
    /// GPTQ's `g_idx`: the group of each input, `i32`, little endian. `None`: `c / group_size`.
    pub group_index: Option<&'a [u8]>,
}

/// A matrix `[out, in]` as a checkpoint stores it.
#[derive(Clone, Copy, Debug)]
pub enum StoredMatrix<'a> {
    /// Floating-point numbers.
    Dense(TensorView<'a>),
    /// 8-bit floating-point numbers with scales.
    Fp8(Fp8<'a>),
    /// 4-bit integers with scales and zero points.
    Int4(Int4<'a>),
}

impl<'a> From<TensorView<'a>> for StoredMatrix<'a> {
    fn from(view: TensorView<'a>) -> Self {
        Self::Dense(view)
    }
}

impl<'a> StoredMatrix<'a> {
    /// `[rows, cols]`
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Dense(view) => view.shape,
            Self::Fp8(fp8) => fp8.shape,
            Self::Int4(int4) => int4.shape,
        }
    }

    /// Bytes in the file, scales and zero points among them.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(view) => view.bytes.len(),
            Self::Fp8(fp8) => fp8.values.len() + fp8.scales.bytes.len(),
            Self::Int4(int4) => {
                let optional = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
                int4.values.len()
                    + int4.scales.bytes.len()
                    + optional(int4.zeros)
                    + optional(int4.group_index)
            }
        }
    }

    /// The tensor of a dense matrix: devices copy it where nothing is to be converted.
    pub fn dense(&self) -> Option<TensorView<'a>> {
        match self {
            Self::Dense(view) => Some(*view),
            Self::Fp8(_) | Self::Int4(_) => None,
        }
    }

    /// Asserts that all bytes are there and that every index is in range, so that reading rows can't fail. The loader
    /// has checked the shapes of the tensors; this is checked again at the boundary of this crate.
    pub fn assert_whole(&self) {
        let [rows, cols] = self.shape();
        match self {
            Self::Dense(view) => assert!(view.has_all_bytes(), "a tensor of another size"),
            Self::Fp8(fp8) => {
                let blocks = [rows.div_ceil(fp8.block[0]), cols.div_ceil(fp8.block[1])];
                assert!(
                    fp8.values.len() == rows * cols
                        && fp8.scales.shape == blocks
                        && fp8.scales.has_all_bytes(),
                    "an fp8 matrix of another size"
                );
            }
            Self::Int4(int4) => int4.assert_whole(),
        }
    }

    /// The values of a row as f32: exact products and differences of what is stored, each rounded once.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.shape()[1], "a row of another width");
        match self {
            Self::Dense(view) => {
                let elements = view.row(row).chunks_exact(view.dtype.bytes());
                for (out, element) in out.iter_mut().zip(elements) {
                    *out = view.dtype.to_f32(element);
                }
            }
            Self::Fp8(fp8) => {
                let values = &fp8.values[row * out.len()..][..out.len()];
                let blocks = out
                    .chunks_mut(fp8.block[1])
                    .zip(values.chunks(fp8.block[1]));
                for (block, (out, values)) in blocks.enumerate() {
                    let scale = fp8.scales.at(row / fp8.block[0], block);
                    for (out, &value) in out.iter_mut().zip(values) {
                        *out = e4m3_to_f32(value) * scale;
                    }
                }
            }
            Self::Int4(int4) => {
                for (col, out) in out.iter_mut().enumerate() {
                    *out = int4.at(row, col);
                }
            }
        }
    }
}

/// The value of an E4M3 number: 4 exponent bits with a bias of 7, 3 mantissa bits, no infinities; 0x7f and 0xff are NaN.
fn e4m3_to_f32(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = ((bits >> 3) & 0xf, f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (0xf, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(i32::from(exponent) - 7),
    };
    sign * magnitude
}

/// Where AWQ puts output `i` of eight in a word, in nibbles from the lowest.
const AWQ_NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

impl Int4<'_> {
    fn n_groups(&self) -> usize {
        match self.order {
            Int4Order::Gptq | Int4Order::Awq => self.scales.shape[0],
            Int4Order::PackQuantized => self.scales.shape[1],
        }
    }

    fn assert_whole(&self) {
        let [rows, cols] = self.shape;
        let groups = self.n_groups();
        let words = |n: usize| n.div_ceil(8);
        let (values, scales, zeros) = match self.order {
            Int4Order::Gptq => (words(cols) * rows, [groups, rows], groups * words(rows)),
            Int4Order::Awq => (cols * words(rows), [groups, rows], groups * words(rows)),
            Int4Order::PackQuantized => (rows * words(cols), [rows, groups], words(rows) * groups),
        };
        assert!(
            self.values.len() == values * 4
                && self.scales.shape == scales
                && self.scales.has_all_bytes()
                && self.zeros.is_none_or(|bytes| bytes.len() == zeros * 4)
                && self.group_index.is_none_or(|bytes| bytes.len() == cols * 4)
                && self.group_size > 0,
            "an int4 matrix of another size"
        );
        assert!(
            (0..cols).all(|col| self.group(col) < groups),
            "an input of a group that has no scale"
        );
    }

    fn group(&self, col: usize) -> usize {
        match self.group_index {
            Some(index) => word(index, col) as usize,
            None => col / self.group_size,
        }
    }

    fn at(&self, row: usize, col: usize) -> f32 {
        let [rows, cols] = self.shape;
        let (group, words) = (self.group(col), |n: usize| n.div_ceil(8));
        let (value, scale) = match self.order {
            Int4Order::Gptq => (
                nibble(word(self.values, col / 8 * rows + row), col % 8),
                self.scales.at(group, row),
            ),
            Int4Order::Awq => (
                nibble(
                    word(self.values, col * words(rows) + row / 8),
                    AWQ_NIBBLE[row % 8],
                ),
                self.scales.at(group, row),
            ),
            Int4Order::PackQuantized => (
                nibble(word(self.values, row * words(cols) + col / 8), col % 8),
                self.scales.at(row, group),
            ),
        };
        let zero = match (self.zeros, self.order) {
            (None, _) => 8,
            (Some(zeros), Int4Order::Gptq) => {
                nibble(word(zeros, group * words(rows) + row / 8), row % 8) + 1
            }
            (Some(zeros), Int4Order::Awq) => nibble(
                word(zeros, group * words(rows) + row / 8),
                AWQ_NIBBLE[row % 8],
            ),
            (Some(zeros), Int4Order::PackQuantized) => {
                nibble(word(zeros, row / 8 * self.n_groups() + group), row % 8)
            }
        };
        (value - zero) as f32 * scale
    }
}

fn word(bytes: &[u8], index: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[index * 4..][..4]);
    u32::from_le_bytes(word)
}

fn nibble(word: u32, index: usize) -> i32 {
    (word >> (4 * index) & 0xf) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_is_what_the_specification_says() {
        for (bits, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0xb8, -1.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(e4m3_to_f32(bits), value, "{bits:#x}");
        }
        assert!(e4m3_to_f32(0x7f).is_nan() && e4m3_to_f32(0xff).is_nan());
        let finite = (0..=0xffu8).filter(|bits| bits & 0x7f != 0x7f);
        for bits in finite {
            let value = e4m3_to_f32(bits);
            assert_eq!(value.abs(), e4m3_to_f32(bits ^ 0x80).abs());
            assert!(value.abs() <= 448.0);
        }
    }
}
