//! How much memory the work of a thread takes at a time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;

/// No parser asks for so much at once; who does would end the process, and the case is told first.
const ENDS: usize = 1 << 30;

/// Counts what the thread has.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// Without destructors, so that they are there for as long as the thread.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static CASE: Cell<(&'static str, u64)> = const { Cell::new(("", 0)) };
}

/// From here on the thread is at this case.
pub(crate) fn begin(name: &'static str, case: u64) {
    CASE.set((name, case));
    LIVE.set(0);
    PEAK.set(0);
}

/// The most that the thread had at a time since then, in bytes.
pub(crate) fn peak() -> usize {
    PEAK.get().max(0) as usize
}

fn count(layout: &Layout, more: isize) {
    if layout.size() > ENDS {
        let (name, case) = CASE.get();
        // Nothing is allocated here: stderr has no buffer.
        let _ = writeln!(
            std::io::stderr(),
            "{name}, case {case}: {} bytes are asked for at once",
            layout.size()
        );
    }
    let live = LIVE.get() + more;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

// SAFETY: the system's allocator does everything; what is counted beside it are numbers of the thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(&layout, layout.size() as isize);
        if layout.size() > ENDS {
            return std::ptr::null_mut();
        }
        // SAFETY: as the caller says of the layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(&layout, -(layout.size() as isize));
        // SAFETY: it came from there.
        unsafe { System.dealloc(pointer, layout) }
    }
}
