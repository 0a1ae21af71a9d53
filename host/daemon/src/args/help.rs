//! What `--help` and `--version` print.

use crate::PROGRAM;

/// `-V`.
pub(super) fn version() -> String {
    format!("{PROGRAM} version {}\n", env!("CARGO_PKG_VERSION"))
}

/// `-h`.
pub(super) fn help() -> String {
    format!("Usage: {PROGRAM} [options]\n{TEXT}")
}

const TEXT: &str = "\
Serves block nodes; the command line is that of qemu-storage-daemon.

  -h, --help             display this help and exit
  -T, --trace <pattern>  accepted and ignored: see OUTPORTD_LOG
  -V, --version          output version information and exit

  --blockdev [driver=]<driver>[,node-name=<N>][,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,force-share=on|off][,detect-zeroes=on|off|unmap]
             [,driver specific parameters...]
                         add a block node; drivers: file, host_device, nbd,
                         null-co, null-aio, raw, the filters blkdebug,
                         compress, copy-on-read and throttle, and every
                         format plugin (qcow2); --blockdev help lists them,
                         --blockdev <driver>,help tells the options of one

  --allow-paths <dir>    let images name backing and data files in <dir>;
                         may be given several times (default: nowhere)

  --chardev socket,id=<id>,path=<path>|host=<host>,port=<port>|fd=<fd>
            [,server=on|off][,wait=on|off]
  --chardev stdio,id=<id>
                         add a character device for a monitor

  --chardev null,id=<id>
                         add one without a connection

  --check-config         say whether the other options and the --config files
                         are right, and exit; nothing is opened or made

  --config <file>        carry out the QMP commands of a file, a JSON list like
                         the one that `outport config dump` prints

  --daemonize            run in the background once startup is complete

  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]
           [,description=<text>][,writable=on|off][,writethrough=on|off]
           [,iothread=<id>][,bitmaps.0=<bitmap>][,allocation-depth=on|off]
           [,metadata-contexts.0.plugin=<name>]
                         export a node over NBD (after --nbd-server), with
                         metadata contexts

  --export [type=]fuse,id=<id>,node-name=<node-name>,mountpoint=<file>
           [,growable=on|off][,writable=on|off][,allow-other=on|off|auto]
           [,iothread=<id>][,passthrough=on|off]
                         show a node as the content of a file that exists

  --export [type=]vhost-user-blk,id=<id>,node-name=<node-name>
           ,addr.type=unix,addr.path=<path>[,writable=on|off]
           [,logical-block-size=<bytes>][,num-queues=<n>][,iothread.0=<id>]
                         serve a node to a virtual machine

  --monitor [chardev=]name[,mode=control][,pretty[=on|off]]
                         run a QMP monitor

  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>
               [,max-connections=<n>][,handshake-max-seconds=<n>]
  --nbd-server addr.type=unix,addr.path=<path>|addr.type=fd,addr.str=<fd>
               [,max-connections=<n>][,handshake-max-seconds=<n>]
               [,tls-creds=<id>][,tls-authz=<id>]
                         start the NBD server

  --object iothread,id=<id>
  --object secret,id=<id>,data=<text>|file=<path>[,format=raw|base64]
           [,keyid=<id>,iv=<base64>]
  --object tls-creds-x509|tls-creds-psk,id=<id>,dir=<folder>
           ,endpoint=server|client[,verify-peer=on|off]
  --object throttle-group,id=<id>[,limits.iops-total=<n>]
           [,limits.bps-total=<bytes>]...
  --object authz-simple|authz-list|authz-list-file,id=<id>,...
  --object authz-wasm,id=<id>,plugin=<name>[,enforce=off]
           [,config.<option>=...][,files.<name>=<path>]
  --object monitor-qmp,id=<id>,chardev=<id>[,pretty=on|off]
           [,close-action=none|delete]
  --object wasm-plugin,id=<id>,filename=<path>,sha256=<hex>
           [,memory-max=<size>][,call-time-max-ms=<ms>]
                         add an object

  --called <text>        what messages call the next option
  --end-with-stdin       end in order when standard input ends

  --pidfile <path>       write the process id to a file after startup

Options take effect in order: what an option refers to comes before it.
OUTPORTD_LOG=debug (or RUST_LOG) sets what is logged to standard error.
";
