//! Allocation status, for NBD's metadata contexts, `qemu-img map` and jobs.

use crate::node::Status;
use crate::{ByteRange, Errno};

use super::Image;
use super::map::Place;

impl Image {
    /// Status of a front part of `range`.
    pub(crate) async fn status(&self, range: ByteRange) -> Result<Status, Errno> {
        let _pass = self.gate.enter().await;
        let run = self.known_run(range).await?;
        let here = Status {
            len: run.len,
            data: false,
            zero: false,
            depth: 1,
        };
        Ok(match run.place {
            Place::Raw { .. } | Place::Coded(_) | Place::Special(_) => {
                Status { data: true, ..here }
            }
            Place::Zero => Status { zero: true, ..here },
            // With a backing image: behind its end. As in QEMU these zeroes count as its own.
            Place::Hole => Status {
                zero: true,
                depth: if self.backing().is_some() { 2 } else { 0 },
                ..here
            },
            Place::Backing(offset) => match self.backing() {
                None => Status {
                    zero: true,
                    depth: 0,
                    ..here
                },
                Some(backing) => {
                    let inside = backing.size().saturating_sub(offset).min(run.len);
                    if inside == 0 {
                        return Ok(Status {
                            zero: true,
                            depth: 2,
                            ..here
                        });
                    }
                    let below = ByteRange::between(offset, offset + inside);
                    let status = backing.status(below).await?;
                    let depth = if status.depth == 0 {
                        0
                    } else {
                        status.depth + 1
                    };
                    Status { depth, ..status }
                }
            },
            Place::Unknown => return Err(Errno::Io),
        })
    }
}
