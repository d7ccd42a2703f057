//! Which device serves: the GPU where there is one, the CPU elsewhere, or what was asked for and nothing else.
//!
//! It knows what each device prefers, so that nobody else asks which one it is.

use std::num::NonZeroUsize;

use crate::cpu::CpuDevice;
use crate::device::{Device, DeviceError, DeviceOptions};
use crate::shape::Precision;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU, or the CPU where there is none that can be used.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU; never the CPU instead.
    Cuda,
}

/// A device that is there, before it holds a model.
pub struct ChosenDevice {
    found: Found,
    why_not_cuda: Option<String>,
}

enum Found {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::cuda::gpu::Gpu>),
}

/// A device that prepares nothing and tells what preparing would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CountedDevice(Counted);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::counting::Counting),
}

const CPU_PREFERENCES: Preferences = Preferences {
    max_sequences: 64,
    max_tokens: 512,
    precision: None,
};

impl CountedDevice {
    /// A device with so much memory, whether this machine has one or not. [`DeviceChoice::Auto`] is the CPU here.
    pub fn imagined(choice: DeviceChoice, memory_bytes: u64) -> Result<Self, DeviceError> {
        match choice {
            DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Self(Counted::Cpu)),
            DeviceChoice::Cuda => imagined_cuda(memory_bytes),
        }
    }

    /// What it is best run with.
    pub fn preferences(&self) -> Preferences {
        match &self.0 {
            Counted::Cpu => CPU_PREFERENCES,
            #[cfg(feature = "cuda")]
            Counted::Cuda(gpu) => Preferences {
                max_sequences: sequences_for(gpu.total_bytes()),
                max_tokens: 8192,
                precision: Some(Precision::BF16),
            },
        }
    }

    /// Makes it; `n_threads` would compute where it is the CPU.
    pub fn make(
        self,
        options: DeviceOptions,
        n_threads: NonZeroUsize,
    ) -> Result<Box<dyn Device>, DeviceError> {
        match self.0 {
            Counted::Cpu => Ok(Box::new(CpuDevice::counting(options, n_threads)?)),
            #[cfg(feature = "cuda")]
            Counted::Cuda(gpu) => Ok(Box::new(crate::cuda::CudaDevice::new(gpu, options)?)),
        }
    }
}

#[cfg(feature = "cuda")]
fn imagined_cuda(memory_bytes: u64) -> Result<CountedDevice, DeviceError> {
    let gpu = crate::cuda::counting::Counting::imagined(memory_bytes);
    Ok(CountedDevice(Counted::Cuda(gpu)))
}

#[cfg(not(feature = "cuda"))]
fn imagined_cuda(_memory_bytes: u64) -> Result<CountedDevice, DeviceError> {
    Err(no_cuda())
}

/// What a device is best run with, where the user has not said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preferences {
    /// Sequences in a step.
    pub max_sequences: u32,
    /// Tokens in a step.
    pub max_tokens: u32,
    /// `None`: the model's own.
    pub precision: Option<Precision>,
}

impl ChosenDevice {
    /// Finds the device. With [`DeviceChoice::Cuda`] the error says what is missing.
    pub fn find(choice: DeviceChoice) -> Result<Self, DeviceError> {
        let cpu = |why_not_cuda| Self {
            found: Found::Cpu,
            why_not_cuda,
        };
        if choice == DeviceChoice::Cpu {
            return Ok(cpu(None));
        }
        match find_cuda() {
            Ok(found) => Ok(Self {
                found,
                why_not_cuda: None,
            }),
            Err(error) if choice == DeviceChoice::Auto => Ok(cpu(Some(error.to_string()))),
            Err(error) => Err(error),
        }
    }

    /// Why [`DeviceChoice::Auto`] did not take the GPU.
    pub fn why_not_cuda(&self) -> Option<&str> {
        self.why_not_cuda.as_deref()
    }

    /// What it is best run with.
    pub fn preferences(&self) -> Preferences {
        self.counted()
            .map_or(CPU_PREFERENCES, |it| it.preferences())
    }

    /// The same device to count on, before anything is loaded. `Err` where it doesn't answer.
    pub fn counted(&self) -> Result<CountedDevice, DeviceError> {
        match &self.found {
            Found::Cpu => Ok(CountedDevice(Counted::Cpu)),
            #[cfg(feature = "cuda")]
            Found::Cuda(gpu) => {
                let gpu = crate::cuda::counting::Counting::like(gpu.as_ref())?;
                Ok(CountedDevice(Counted::Cuda(gpu)))
            }
        }
    }

    /// Makes it; `n_threads` compute where it is the CPU.
    pub fn make(
        self,
        options: DeviceOptions,
        n_threads: NonZeroUsize,
    ) -> Result<Box<dyn Device>, DeviceError> {
        match self.found {
            Found::Cpu => Ok(Box::new(CpuDevice::new(options, n_threads)?)),
            #[cfg(feature = "cuda")]
            Found::Cuda(gpu) => Ok(Box::new(crate::cuda::CudaDevice::new(*gpu, options)?)),
        }
    }
}

/// Sequences in a step for a GPU with so much memory: about four for each GiB, a power of two, so that chats of ordinary
/// length fill the memory: 512 on an H200, 256 on a GPU of 80 GB.
#[cfg(any(test, feature = "cuda"))]
fn sequences_for(memory_bytes: u64) -> u32 {
    let wanted = (memory_bytes >> 30).saturating_mul(4).clamp(64, 1024) as u32;
    1 << wanted.ilog2()
}

#[cfg(feature = "cuda")]
fn find_cuda() -> Result<Found, DeviceError> {
    crate::cuda::gpu::Gpu::open().map(|gpu| Found::Cuda(Box::new(gpu)))
}

#[cfg(not(feature = "cuda"))]
fn find_cuda() -> Result<Found, DeviceError> {
    Err(no_cuda())
}

#[cfg(not(feature = "cuda"))]
fn no_cuda() -> DeviceError {
    DeviceError::Unavailable {
        device: "cuda",
        why: "this build of kvasir-server has no CUDA device; use --device cpu, or an image built with CUDA".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_slots_follow_from_the_memory() {
        for (gib, slots) in [
            (0, 64),
            (24, 64),
            (40, 128),
            (79, 256),
            (140, 512),
            (1000, 1024),
        ] {
            assert_eq!(sequences_for(gib << 30), slots, "{gib} GiB");
        }
    }
}
