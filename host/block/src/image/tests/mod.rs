//! Images of a toy format, on real files.

mod bitmaps;
mod cost;
mod crash;
mod disk;
mod faults;
mod model;
mod parallel;
mod toy;
mod window;
