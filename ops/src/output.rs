//! Results on stdout. A reader that has closed it, such as `head`, wants no more of them, which is no fault;
//! where they cannot be written for another reason, the process ends, for a script would take what is
//! there for all.

use std::fmt;
use std::io::{ErrorKind, Write};

/// As `println!`.
macro_rules! outln {
    () => { $crate::output::line(format_args!("")) };
    ($($words:tt)*) => { $crate::output::line(format_args!($($words)*)) };
}

/// As `print!`.
macro_rules! out {
    ($($words:tt)*) => { $crate::output::text(format_args!($($words)*)) };
}

pub(crate) fn line(words: fmt::Arguments<'_>) {
    written(writeln!(std::io::stdout().lock(), "{words}"));
}

pub(crate) fn text(words: fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    written(out.write_fmt(words).and_then(|()| out.flush()));
}

fn written(result: std::io::Result<()>) {
    match result {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            let _ = writeln!(std::io::stderr(), "error: cannot write to stdout: {error}");
            std::process::exit(1);
        }
        _ => {}
    }
}
