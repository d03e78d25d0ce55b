//! How messages of the authority become bytes: as tonic has it, with room for a CSR and for a chain in place of eight
//! thousand bytes for either. Both grow with what needs more.

#![warn(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]

use prost::Message;
use tonic::codec::{self, BufferSettings};
use tonic_prost::ProstCodec;

/// What is read into at first, in bytes.
const READ: usize = 1024;
/// What is written to at first, in bytes. A chain without intermediates, and its root, fit.
const WRITTEN: usize = 2048;
/// How much of a stream of messages is written together, as tonic has it.
const TOGETHER: usize = 32 * 1024;

/// For `application/grpc+proto`.
#[derive(Debug, Default)]
pub(crate) struct Codec<T, U>(std::marker::PhantomData<(T, U)>);

impl<T, U> codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = <ProstCodec<T, U> as codec::Codec>::Encoder;
    type Decoder = <ProstCodec<T, U> as codec::Codec>::Decoder;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(WRITTEN, TOGETHER))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(READ, TOGETHER))
    }
}
