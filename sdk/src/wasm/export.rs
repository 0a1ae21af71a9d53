//! The exports of the component: each call, translated and handed to the image.

#![forbid(unsafe_code)]

use super::bindings::about::exports::outport::plugin::meta;
use super::bindings::about::outport::plugin::types;
use super::bindings::bitmaps::exports::outport::plugin::format_bitmaps;
use super::bindings::creator::exports::outport::plugin::format_create;
use super::bindings::reader::exports::outport::plugin::format_reader;
use super::bindings::reader::outport::plugin::extents;
use super::bindings::takeover::exports::outport::plugin::format_takeover;
use super::bindings::writer::exports::outport::plugin::format_writer;
use super::image::{Instance, enter, keep, with, writable};
use super::import::Host;
use crate::{
    Bits, CreatableFormat, Extent, Format, Geometry, Grant, Info, KeepsBitmaps, KeptBitmap,
    WritableFormat,
};
use std::marker::PhantomData;

type Answer<T> = Result<T, types::Error>;

/// A format as a component: [`ReadOnly`] or [`Writable`].
pub trait Adapter {
    /// The format.
    type Image: Format + Instance;
    /// Its [`Format::activate`], or that of a writable format.
    fn activate(image: &mut Self::Image, grants: &[Grant]) -> crate::Result<Geometry>;
}

/// World `format-ro`.
#[derive(Debug)]
pub struct ReadOnly<T>(PhantomData<T>);

impl<T: Format + Instance> Adapter for ReadOnly<T> {
    type Image = T;
    fn activate(image: &mut T, grants: &[Grant]) -> crate::Result<Geometry> {
        image.activate(&Host, grants)
    }
}

/// Worlds `format` and `format-full`.
#[derive(Debug)]
pub struct Writable<T>(PhantomData<T>);

impl<T: WritableFormat + Instance> Adapter for Writable<T> {
    type Image = T;
    /// An image that was opened read-only has no transaction to write to.
    fn activate(image: &mut T, grants: &[Grant]) -> crate::Result<Geometry> {
        if writable() {
            image.activate_writable(&mut Host, grants)
        } else {
            image.activate(&Host, grants)
        }
    }
}

/// Every element by its `From`.
fn list<A, B: From<A>>(items: Vec<A>) -> Vec<B> {
    items.into_iter().map(B::from).collect()
}

/// Who the plugin is.
pub trait About {
    /// Its own words.
    fn info() -> Info;
}

impl<T: Format> About for ReadOnly<T> {
    fn info() -> Info {
        T::info()
    }
}

impl<T: Format> About for Writable<T> {
    fn info() -> Info {
        T::info()
    }
}

impl<A: About> meta::Guest for A {
    fn describe() -> meta::Info {
        enter();
        let info = A::info();
        meta::Info {
            name: info.name.to_owned(),
            version: info.version.to_owned(),
            description: info.description.to_owned(),
            options_schema: info.options_schema.to_owned(),
        }
    }
}

impl<A: Adapter> format_reader::Guest for A {
    fn probe(head: Vec<u8>, size: u64) -> u8 {
        enter();
        A::Image::probe(&head, size)
    }

    fn open(options: String, writable: bool) -> Answer<Vec<extents::Child>> {
        enter();
        let (image, children) = A::Image::open(&Host, &options, writable)?;
        keep(image, writable)?;
        Ok(list(children))
    }

    fn activate(grants: Vec<extents::Grant>) -> Answer<extents::Geometry> {
        let grants: Vec<Grant> = list(grants);
        with(|image| Ok(A::activate(image, &grants)?.into()))
    }

    fn resolve(range: types::ByteRange) -> Answer<Vec<extents::Extent>> {
        with(|image: &mut A::Image| Ok(list(image.resolve(&Host, range.into())?)))
    }

    fn read_special(id: u64, range: types::ByteRange) -> Answer<Vec<u8>> {
        with(|image: &mut A::Image| image.read_special(&Host, id, range.into()))
    }

    fn info() -> Answer<String> {
        with(|image: &mut A::Image| image.facts(&Host))
    }
}

impl<T: WritableFormat + Instance> format_takeover::Guest for Writable<T> {
    fn take_over() -> Answer<()> {
        with(|image: &mut T| image.take_over())
    }
}

impl<T: WritableFormat + Instance> format_writer::Guest for Writable<T> {
    fn prepare_write(
        intents: Vec<format_writer::WriteIntent>,
    ) -> Answer<Vec<format_writer::Placement>> {
        let intents: Vec<_> = list(intents);
        with(|image: &mut T| Ok(list(image.prepare_write(&mut Host, &intents)?)))
    }

    fn commit_write(tokens: Vec<u64>) -> Answer<Vec<extents::Extent>> {
        with(|image: &mut T| Ok(list::<Extent, _>(image.commit_write(&mut Host, &tokens)?)))
    }

    fn abort_write(tokens: Vec<u64>) -> Answer<()> {
        with(|image: &mut T| image.abort_write(&mut Host, &tokens))
    }

    fn discard(
        range: types::ByteRange,
        kind: format_writer::DiscardKind,
    ) -> Answer<Vec<extents::Extent>> {
        with(|image: &mut T| Ok(list(image.discard(&mut Host, range.into(), kind.into())?)))
    }

    fn reclaim(freed: Vec<format_writer::SlotRange>) -> Answer<()> {
        let freed: Vec<_> = list(freed);
        with(|image: &mut T| image.reclaim(&mut Host, &freed))
    }

    fn flush() -> Answer<()> {
        with(|image: &mut T| image.flush(&mut Host))
    }

    fn resize(size: u64) -> Answer<extents::Geometry> {
        with(|image: &mut T| Ok(image.resize(&mut Host, size)?.into()))
    }

    fn check(
        fix: format_writer::Repair,
        cursor: u64,
    ) -> Answer<(format_writer::CheckReport, Option<u64>)> {
        with(|image: &mut T| {
            let (report, next) = image.check(&mut Host, fix.into(), cursor)?;
            Ok((report.into(), next))
        })
    }

    fn close() -> Answer<()> {
        with(|image: &mut T| image.close(&mut Host))
    }
}

impl<T: CreatableFormat + Instance> format_create::Guest for Writable<T> {
    fn create_schema() -> String {
        enter();
        T::create_schema().to_owned()
    }

    fn measure(options: String) -> Answer<format_create::Measurement> {
        enter();
        let m = T::measure(&options)?;
        Ok(format_create::Measurement {
            required: m.required,
            fully_allocated: m.fully_allocated,
        })
    }

    fn create(options: String) -> Answer<()> {
        enter();
        Ok(T::create(&mut Host, &options)?)
    }
}

impl<T: KeepsBitmaps + Instance> format_bitmaps::Guest for Writable<T> {
    fn list_bitmaps(first: u32) -> Answer<Vec<format_bitmaps::Bitmap>> {
        with(|image: &mut T| Ok(list(image.list_bitmaps(&Host, first)?)))
    }

    fn read_bits(name: String, from: u64) -> Answer<Option<format_bitmaps::Bits>> {
        with(|image: &mut T| Ok(image.read_bits(&Host, &name, from)?.map(Into::into)))
    }

    fn check_bitmap(bitmap: format_bitmaps::Bitmap, kept: Vec<String>) -> Answer<()> {
        with(|image: &mut T| image.check_bitmap(&Host, &bitmap.into(), &kept))
    }

    fn store_bits(bitmap: format_bitmaps::Bitmap, bits: format_bitmaps::Bits) -> Answer<()> {
        let (bitmap, bits): (KeptBitmap, Bits) = (bitmap.into(), bits.into());
        with(|image: &mut T| image.store_bits(&mut Host, &bitmap, &bits))
    }

    fn keep_bitmaps(bitmaps: Vec<format_bitmaps::Bitmap>) -> Answer<bool> {
        let bitmaps: Vec<_> = list(bitmaps);
        with(|image: &mut T| image.keep_bitmaps(&mut Host, &bitmaps))
    }
}
