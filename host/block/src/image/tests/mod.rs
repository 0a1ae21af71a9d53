//! Images of a toy format.
